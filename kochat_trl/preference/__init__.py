"""DPO and KTO: TRL's trainers, on rows of ids and on one backbone."""
