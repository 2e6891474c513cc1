"""What the sample data knows: tables of facts in Korean, and the ways to ask for them.

A `_Topic` (rows and phrasings) gives `Fact`s, each asked in several ways, with the particles that each word takes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

# --- Korean particles ---------------------------------------------------------------------------

# The form after a final consonant -> the form after a vowel.
_PARTICLES = {"은": "는", "이": "가", "을": "를", "과": "와", "으로": "로", "이에요": "예요", "이야": "야"}
# 0 stands for every number that ends in it: 영, 십, 백, 천 and 만 all have a final consonant.
_DIGIT_READINGS = "영일이삼사오육칠팔구"
_FINAL_RIEUL = 8


def with_particle(word: str, particle: str) -> str:
    """Append ``particle``, named by its form after a consonant, in the form that suits ``word``.

    Digits are read in Sino-Korean: ``with_particle("3", "은")`` is "3은", and "2" gives "2는".
    """
    last = word[-1]
    syllable = _DIGIT_READINGS[int(last)] if last in "0123456789" else last
    if not "가" <= syllable <= "힣":
        raise ValueError(f"Cannot tell which particle follows {word!r}: it ends in {last!r}")
    final = (ord(syllable) - ord("가")) % 28
    takes_vowel_form = final == 0 or (particle == "으로" and final == _FINAL_RIEUL)
    return word + (_PARTICLES[particle] if takes_vowel_form else particle)


class _Word(str):
    """A string whose format spec is a particle: ``f"{_Word('개'):은}"`` is "개는"."""

    def __format__(self, particle: str) -> str:
        return with_particle(self, particle) if particle else str(self)


# --- From tables to facts -----------------------------------------------------------------------

_Row = tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One thing to know, every way to ask for it, and the right, wrong and curt ways to say it."""

    domain: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    full: str
    wrongs: tuple[str, ...]
    curts: tuple[str, ...]
    held_out_whole: bool = False


@dataclass(frozen=True)
class _Topic:
    """Rows of one kind and the templates that put them into words.

    In a template ``{a}`` is a row's last cell, the answer; ``{x}``, ``{y}``, ``{z}`` are the cells
    before it. Wrong answers are the answers of the topic's other rows.
    """

    domain: str
    rows: tuple[_Row, ...]
    prompts: tuple[str, ...]
    full: str
    curts: tuple[str, ...] = ("{a}", "{a}.", "{a:이야}")
    held_out_whole: bool = False

    def facts(self) -> list[Fact]:
        pool = list(dict.fromkeys(row[-1] for row in self.rows))
        return [self._fact(row, pool) for row in self.rows]

    def _fact(self, row: _Row, pool: Sequence[str]) -> Fact:
        *cells, answer = map(_Word, row)
        others = (_Word(other) for other in pool if other != answer)
        slots = dict(zip("xyz", cells, strict=False))
        return Fact(
            domain=self.domain,
            prompts=tuple(template.format(**slots) for template in self.prompts),
            answers=(str(answer), *_SYNONYMS.get(answer, ())),
            full=self.full.format(**slots, a=answer),
            wrongs=tuple(self.full.format(**slots, a=other) for other in others),
            curts=tuple(template.format(**slots, a=answer) for template in self.curts),
            held_out_whole=self.held_out_whole,
        )


def _table(text: str) -> tuple[_Row, ...]:
    """Rows split by commas or line ends, cells by colons: ``"프랑스:파리, 독일:베를린"``."""
    entries = (entry.strip() for entry in re.split(r"[,\n]", text))
    return tuple(tuple(entry.split(":")) for entry in entries if entry)


def _grouped(text: str) -> tuple[_Row, ...]:
    """Rows that share an answer, one answer a line: ``"과일: 사과, 배"``."""
    rows = []
    for line in text.strip().splitlines():
        answer, items = line.split(": ")
        rows += [(item, answer) for item in items.split(", ")]
    return tuple(rows)


def _ask(stems: str, endings: str, others: str = "") -> tuple[str, ...]:
    """Every stem with every ending, then ``others`` as they are; all are split by slashes."""
    pairs = product(stems.split("/"), endings.split("/"))
    return (*(f"{stem} {ending}" for stem, ending in pairs), *filter(None, others.split("/")))


_WHAT = "뭐예요?/무엇인가요?/뭐야?"
_WHERE = "어디예요?/어디인가요?/어디야?"
_WHO = "누구예요?/누구인가요?/누구야?"
_CALLED = "뭐라고 해요?/뭐라고 부르나요?/뭐라고 불러?"

# Other words for an answer, after the word that the tables use.
_SYNONYMS = {
    answer: tuple(others)
    for answer, *others in _table("""
하얀색:흰색:하양, 검은색:검정:까만색, 노란색:노랑, 빨간색:빨강:붉은색, 파란색:파랑:푸른색
초록색:초록:녹색, 보라색:보라, 삐악삐악:삐약삐약, 에베레스트산:에베레스트, 안데스산맥:안데스
바이칼호:바이칼, 대왕고래:흰긴수염고래, 제주도:제주, 세종대왕:세종, 경찰관:경찰
선생님:선생:교사, 집배원:우체부
""")
}

# --- Tables of facts ----------------------------------------------------------------------------

_CAPITALS = _table("""
대한민국:서울, 일본:도쿄, 중국:베이징, 몽골:울란바토르, 베트남:하노이, 태국:방콕, 인도:뉴델리
필리핀:마닐라, 말레이시아:쿠알라룸푸르, 네팔:카트만두, 이란:테헤란, 이라크:바그다드
튀르키예:앙카라, 캄보디아:프놈펜, 라오스:비엔티안, 이집트:카이로, 케냐:나이로비, 가나:아크라
모로코:라바트, 영국:런던, 프랑스:파리, 독일:베를린, 이탈리아:로마, 스페인:마드리드
포르투갈:리스본, 네덜란드:암스테르담, 벨기에:브뤼셀, 스위스:베른, 오스트리아:빈, 체코:프라하
폴란드:바르샤바, 헝가리:부다페스트, 그리스:아테네, 스웨덴:스톡홀름, 노르웨이:오슬로
핀란드:헬싱키, 덴마크:코펜하겐, 아이슬란드:레이캬비크, 아일랜드:더블린, 러시아:모스크바
미국:워싱턴, 캐나다:오타와, 쿠바:아바나, 브라질:브라질리아, 아르헨티나:부에노스아이레스
칠레:산티아고, 페루:리마, 콜롬비아:보고타, 호주:캔버라, 뉴질랜드:웰링턴
""")
_LANDMARKS = _table("""
경복궁:서울, 덕수궁:서울, 창덕궁:서울, 남산타워:서울, 롯데월드타워:서울, 해운대:부산, 태종대:부산
감천문화마을:부산, 자갈치시장:부산, 불국사:경주, 첨성대:경주, 석굴암:경주, 한라산:제주
성산일출봉:제주, 만장굴:제주, 월미도:인천, 한밭수목원:대전, 동성로:대구, 대왕암공원:울산
간절곶:울산, 호미곶:포항, 오죽헌:강릉, 경포대:강릉, 아바이마을:속초, 소양강댐:춘천, 남이섬:춘천
하회마을:안동, 도산서원:안동, 부석사:영주, 소수서원:영주, 촉석루:진주, 동피랑마을:통영
오동도:여수, 향일암:여수, 낙안읍성:순천, 광한루:남원, 죽녹원:담양, 해인사:합천, 통도사:양산
공산성:공주, 무령왕릉:공주, 낙화암:부여, 정림사지:부여, 독립기념관:천안, 현충사:아산, 청남대:청주
탄금대:충주, 법주사:보은, 에버랜드:용인, 한국민속촌:용인, 임진각:파주
""")
_OPPOSITES = _table("""
크다:작다, 길다:짧다, 높다:낮다, 많다:적다, 넓다:좁다, 무겁다:가볍다, 빠르다:느리다, 밝다:어둡다
덥다:춥다, 뜨겁다:차갑다, 두껍다:얇다, 굵다:가늘다, 깊다:얕다, 쉽다:어렵다, 좋다:나쁘다
멀다:가깝다, 열다:닫다, 켜다:끄다, 사다:팔다, 웃다:울다, 입다:벗다, 오르다:내리다, 이기다:지다
강하다:약하다, 같다:다르다, 있다:없다, 늘다:줄다, 얻다:잃다, 젊다:늙다, 비싸다:싸다, 밀다:당기다
안:밖, 위:아래, 앞:뒤, 왼쪽:오른쪽, 낮:밤, 시작:끝, 입구:출구, 남쪽:북쪽, 동쪽:서쪽
기쁨:슬픔, 성공:실패, 전쟁:평화
""")
_SOUNDS = _table("""
개:멍멍, 고양이:야옹, 소:음매, 돼지:꿀꿀, 오리:꽥꽥, 닭:꼬끼오, 병아리:삐악삐악, 개구리:개굴개굴
참새:짹짹, 매미:맴맴, 귀뚜라미:귀뚤귀뚤, 뻐꾸기:뻐꾹뻐꾹, 호랑이:어흥, 쥐:찍찍, 비둘기:구구
말:히힝, 까마귀:까악까악, 까치:깍깍, 부엉이:부엉부엉
""")
_LEGS = _grouped("""
2: 닭, 오리, 참새, 비둘기, 독수리, 타조
4: 개, 고양이, 소, 말, 돼지, 호랑이, 사자, 토끼, 코끼리, 기린, 개구리
6: 개미, 벌, 파리, 모기, 메뚜기, 잠자리, 나비
8: 거미, 문어, 전갈
10: 오징어, 게
""")
_COLOURS = _grouped("""
노란색: 바나나, 병아리, 개나리, 레몬, 옥수수, 해바라기
빨간색: 딸기, 토마토, 소방차, 고추장, 앵두
하얀색: 눈, 우유, 소금, 두부, 밀가루, 백조
검은색: 까마귀, 숯, 석탄
초록색: 오이, 시금치, 잔디, 브로콜리
파란색: 맑은 하늘, 바다
주황색: 당근, 귤, 단감
보라색: 가지, 제비꽃, 라벤더
분홍색: 벚꽃, 진달래
갈색: 초콜릿, 도토리, 흙
""")
_CATEGORIES = _grouped("""
과일: 사과, 딸기, 바나나, 귤
채소: 배추, 시금치, 양파
꽃: 장미, 튤립, 국화
나무: 소나무, 은행나무, 단풍나무
새: 참새, 비둘기, 독수리
곤충: 나비, 개미, 메뚜기
물고기: 고등어, 연어, 붕어
악기: 피아노, 기타, 가야금
운동: 축구, 야구, 배드민턴
가구: 의자, 책상, 침대
탈것: 비행기, 버스, 기차
옷: 바지, 치마, 외투
학용품: 연필, 공책, 지우개
음료: 주스, 커피, 콜라
""")
_SUPERLATIVE_THINGS = _table("""
세계에서 가장 높은 산:에베레스트산, 대한민국에서 가장 높은 산:한라산
한반도에서 가장 높은 산:백두산, 세계에서 가장 넓은 바다:태평양
태양계에서 가장 큰 행성:목성, 태양계에서 가장 작은 행성:수성
태양에서 가장 먼 행성:해왕성, 태양계에서 가장 뜨거운 행성:금성
땅에서 가장 빠른 동물:치타, 세계에서 가장 큰 동물:대왕고래, 키가 가장 큰 동물:기린
땅에서 가장 큰 동물:코끼리, 세계에서 가장 큰 새:타조, 세계에서 가장 작은 새:벌새
대한민국에서 가장 긴 강:낙동강, 가장 단단한 광물:다이아몬드, 가장 가벼운 원소:수소
세계에서 가장 긴 산맥:안데스산맥, 세계에서 가장 깊은 호수:바이칼호
지구에서 가장 가까운 별:태양
""")
_SUPERLATIVE_PLACES = _table("""
세계에서 가장 넓은 나라:러시아, 세계에서 가장 작은 나라:바티칸, 세계에서 가장 큰 대륙:아시아
세계에서 가장 추운 대륙:남극, 세계에서 가장 큰 섬:그린란드, 대한민국에서 가장 큰 섬:제주도
대한민국에서 인구가 가장 많은 도시:서울
""")
_CREATORS = _table("""
구운몽:썼:김만중, 열하일기:썼:박지원, 난중일기:썼:이순신, 목민심서:썼:정약용, 동의보감:썼:허준
삼국사기:썼:김부식, 삼국유사:썼:일연, 서시:썼:윤동주, 진달래꽃:썼:김소월, 소나기:썼:황순원
운수 좋은 날:썼:현진건, 메밀꽃 필 무렵:썼:이효석, 동백꽃:썼:김유정, 님의 침묵:썼:한용운
햄릿:썼:셰익스피어, 어린 왕자:썼:생텍쥐페리, 돈키호테:썼:세르반테스, 노인과 바다:썼:헤밍웨이
죄와 벌:썼:도스토옙스키, 전쟁과 평화:썼:톨스토이, 변신:썼:카프카, 파우스트:썼:괴테, 데미안:썼:헤세
모나리자:그렸:다빈치, 별이 빛나는 밤:그렸:고흐, 게르니카:그렸:피카소, 절규:그렸:뭉크
인왕제색도:그렸:정선, 몽유도원도:그렸:안견, 한글:만들었:세종대왕, 대동여지도:만들었:김정호
다이너마이트:만들었:노벨, 운명 교향곡:작곡했:베토벤, 마술피리:작곡했:모차르트
애국가:작곡했:안익태
""")
_TOOLS = _table("""
종이를 자를 때:가위, 글씨를 지울 때:지우개, 비가 올 때:우산, 이를 닦을 때:칫솔, 못을 박을 때:망치
나무를 자를 때:톱, 국을 먹을 때:숟가락, 반찬을 집을 때:젓가락, 시간을 볼 때:시계
몸무게를 잴 때:체중계, 온도를 잴 때:온도계, 별을 볼 때:망원경, 작은 글씨를 볼 때:돋보기
바닥을 쓸 때:빗자루, 먼지를 빨아들일 때:청소기, 옷을 빨 때:세탁기, 옷을 다릴 때:다리미
옷을 꿰맬 때:바늘, 음식을 차게 보관할 때:냉장고, 사진을 찍을 때:카메라, 방향을 찾을 때:나침반
문을 열 때:열쇠, 불을 끌 때:소화기, 물을 끓일 때:주전자, 땅을 팔 때:삽, 손톱을 깎을 때:손톱깎이
얼굴을 비춰 볼 때:거울, 계산을 할 때:계산기, 손을 씻을 때:비누, 밥을 지을 때:밥솥
""")
_JOBS = _table("""
아픈 사람을 치료하는:의사, 불을 끄는:소방관, 도둑을 잡는:경찰관, 학생을 가르치는:선생님
비행기를 조종하는:조종사, 빵을 만드는:제빵사, 음식을 만드는:요리사, 머리를 잘라 주는:미용사
편지를 배달하는:집배원, 그림을 그리는:화가, 노래를 부르는:가수, 소설을 쓰는:소설가
시를 쓰는:시인, 농사를 짓는:농부, 물고기를 잡는:어부, 재판을 하는:판사, 약을 짓는:약사
동물을 치료하는:수의사, 영화를 만드는:영화감독, 신문 기사를 쓰는:기자, 집을 설계하는:건축가
""")
_PLACES = _table("""
책을 빌리는:도서관, 영화를 보는:영화관, 돈을 맡기는:은행, 편지를 부치는:우체국, 약을 사는:약국
아플 때 가는:병원, 기차를 타는:기차역, 비행기를 타는:공항, 배를 타는:항구, 빵을 사는:빵집
학생이 공부하는:학교, 동물을 구경하는:동물원, 옛 물건을 전시하는:박물관, 그림을 전시하는:미술관
책을 사는:서점, 머리를 자르는:미용실, 자동차에 기름을 넣는:주유소, 버스를 기다리는:정류장
별을 관측하는:천문대, 놀이 기구를 타는:놀이공원, 밥을 사 먹는:식당
""")
_SEASONS = _grouped("""
봄: 3월, 4월, 5월
여름: 6월, 7월, 8월
가을: 9월, 10월, 11월
겨울: 12월, 1월, 2월
""")
_MONTH_LENGTHS = _grouped("""
30: 4월, 6월, 9월, 11월
31: 1월, 3월, 5월, 7월, 8월, 10월, 12월
""")
_UNITS = _table("""
킬로미터:미터:1000, 미터:센티미터:100, 센티미터:밀리미터:10, 톤:킬로그램:1000, 킬로그램:그램:1000
리터:밀리리터:1000, 시간:분:60, 분:초:60, 년:개월:12
""")
_NUMBER_PAIRS = _table("""
3:7, 9:4, 2:8, 10:6, 5:1, 12:15, 20:11, 18:13, 14:17, 16:19, 30:25, 40:50, 70:60, 22:32, 45:54
""")
_WEEKDAYS = tuple(f"{name}요일" for name in "월화수목금토일")
_MONTHS = tuple(str(number) for number in range(1, 13))
_NEIGHBOURS = tuple(
    (f"{number} {wording}", str(number + step))
    for number in range(2, 31)
    for wording, step in (("다음", 1), ("바로 앞", -1))
)
_SUMS = tuple((str(a), str(b), str(a + b)) for a, b in product(range(1, 10), repeat=2))
_DIFFERENCES = tuple((str(a), str(b), str(a - b)) for a in range(2, 11) for b in range(1, a))
_PRODUCTS = tuple((str(a), str(b), str(a * b)) for a, b in product(range(2, 10), repeat=2))


def _cycle(names: Sequence[str], steps: Mapping[str, int]) -> tuple[_Row, ...]:
    """Rows (name, wording of a step, the name that many steps on), going round at the end."""
    return tuple(
        (name, wording, names[(place + step) % len(names)])
        for wording, step in steps.items()
        for place, name in enumerate(names)
    )


# --- How each topic is asked and answered -------------------------------------------------------


def _arithmetic(rows: tuple[_Row, ...], sign: str, clause: str) -> _Topic:
    prompts = _ask(f"{{x}} {sign} {{y:은}}/{clause}", "얼마예요?/몇이야?")
    full = f"{{x}} {sign} {{y:은}} {{a}}입니다."
    return _Topic("arithmetic", rows, prompts, full, held_out_whole=True)


def _unit(large: str, small: str, factor: str) -> _Topic:
    return _Topic(
        "unit",
        tuple((f"{count}{large}", small, str(count * int(factor))) for count in range(1, 6)),
        _ask("{x:은}/{x:을} {y:으로} 바꾸면", "몇 {y:이에요}?/몇 {y}인가요?/몇 {y:이야}?"),
        "{x:은} {a}{y}입니다.",
        ("{a}{y}", "{a}{y}.", "{a}{y:이야}"),
    )


def _comparison(left: str, right: str) -> _Topic:
    low, high = sorted((left, right), key=int)
    return _Topic(
        "comparison",
        ((left, right, "큰", high), (left, right, "작은", low)),
        _ask("{x:과} {y} 중에서 더 {z} 수는/{x:과} {y} 중 더 {z} 것은", _WHAT),
        "{x:과} {y} 중에서 더 {z} 수는 {a}입니다.",
    )


_TOPICS = (
    _Topic(
        "capital",
        _CAPITALS,
        _ask("{x}의 수도는/{x} 수도는", _WHERE, "{x}의 수도를 알려 주세요./{x:은} 수도가 어디예요?"),
        "{x}의 수도는 {a}입니다.",
    ),
    _Topic(
        "landmark",
        _LANDMARKS,
        _ask(
            "{x:은} 어디에/{x:은} 어느 지역에",
            "있어요?/있나요?/있어?",
            "{x:이} 있는 곳은 어디예요?/{x:이} 어디에 있는지 알려 주세요.",
        ),
        "{x:은} {a}에 있습니다.",
        ("{a}", "{a}.", "{a}에 있어"),
    ),
    _arithmetic(_SUMS, "더하기", "{x}에 {y:을} 더하면"),
    _arithmetic(_DIFFERENCES, "빼기", "{x}에서 {y:을} 빼면"),
    _arithmetic(_PRODUCTS, "곱하기", "{x}에 {y:을} 곱하면"),
    *(_unit(*row) for row in _UNITS),
    *(_comparison(*row) for row in _NUMBER_PAIRS),
    _Topic("counting", _NEIGHBOURS, _ask("{x} 수는", _WHAT, "{x}에 오는 수는 뭐예요?"), "{x} 수는 {a}입니다."),
    _Topic(
        "weekday",
        _cycle(_WEEKDAYS, {"다음 날": 1, "전날": -1, "이틀 뒤": 2, "이틀 전": -2}),
        _ask("{x} {y:은}/오늘이 {x}이면 {y:은}", "무슨 요일이에요?/무슨 요일인가요?/무슨 요일이야?"),
        "{x} {y:은} {a}입니다.",
    ),
    _Topic(
        "month",
        _cycle(_MONTHS, {"다음 달": 1, "바로 앞 달": -1}),
        _ask("{x}월 {y:은}", "몇 월이에요?/몇 월인가요?/몇 월이야?/몇 월입니까?"),
        "{x}월 {y:은} {a}월입니다.",
        ("{a}월", "{a}월.", "{a}월이야"),
    ),
    _Topic(
        "month_length",
        _MONTH_LENGTHS,
        _ask("{x:은}", "며칠까지 있어요?/며칠까지 있나요?/며칠까지 있어?/며칠까지예요?"),
        "{x:은} {a}일까지 있습니다.",
        ("{a}일", "{a}일.", "{a}일까지야"),
    ),
    _Topic(
        "season",
        _SEASONS,
        _ask("{x:은}", "무슨 계절이에요?/무슨 계절인가요?/무슨 계절이야?/어느 계절이에요?"),
        "{x:은} {a}입니다.",
    ),
    _Topic(
        "opposite",
        _OPPOSITES + tuple((right, left) for left, right in _OPPOSITES),
        _ask("{x}의 반대말은/{x:과} 반대되는 말은", _WHAT),
        "{x}의 반대말은 {a}입니다.",
        ("{a}", "{a}."),
    ),
    _Topic(
        "animal_sound",
        _SOUNDS,
        _ask("{x:은} 어떻게/{x:은} 어떤 소리로", "울어요?/우나요?/울어?"),
        "{x:은} {a} 하고 웁니다.",
        ("{a}", "{a}.", "{a} 하고 울어"),
    ),
    _Topic(
        "animal_legs",
        _LEGS,
        _ask("{x:은} 다리가/{x} 다리는", "몇 개예요?/몇 개인가요?/몇 개야?"),
        "{x:은} 다리가 {a}개입니다.",
        ("{a}개", "{a}개.", "{a}개야"),
    ),
    _Topic(
        "colour",
        _COLOURS,
        _ask(
            "{x:은}",
            "무슨 색이에요?/무슨 색인가요?/무슨 색이야?/어떤 색이에요?",
            "{x}의 색깔은 뭐예요?/{x:이} 무슨 색인지 알려 주세요.",
        ),
        "{x:은} {a}입니다.",
    ),
    _Topic(
        "category",
        _CATEGORIES,
        _ask("{x:은} 무엇에/{x:은} 어떤 종류에", "속해요?/속하나요?/속해?"),
        "{x:은} {a}에 속합니다.",
    ),
    _Topic(
        "superlative",
        _SUPERLATIVE_THINGS,
        _ask("{x:은}", _WHAT, "{x:을} 알려 주세요./{x:이} 뭔지 알아?/{x:이} 뭐예요?"),
        "{x:은} {a}입니다.",
    ),
    _Topic(
        "superlative",
        _SUPERLATIVE_PLACES,
        _ask("{x:은}", _WHERE, "{x:을} 알려 주세요./{x:이} 어디인지 알아?/{x:이} 어디예요?"),
        "{x:은} {a}입니다.",
    ),
    _Topic(
        "creator",
        _CREATORS,
        _ask("{x:은} 누가/누가 {x:을}", "{y}어요?/{y}나요?/{y}어?", "{x:을} 누가 {y}는지 알려 주세요."),
        "{x:은} {a:이} {y}습니다.",
        ("{a}", "{a}.", "{a:이} {y}어"),
    ),
    _Topic(
        "tool",
        _TOOLS,
        _ask("{x} 쓰는 물건은", _WHAT, "{x:은} 뭘 써요?/{x:은} 무엇을 쓰나요?/{x} 뭐 써?"),
        "{x:은} {a:을} 씁니다.",
    ),
    _Topic("job", _JOBS, _ask("{x} 사람은", _WHO) + _ask("{x} 사람을", _CALLED), "{x} 사람은 {a}입니다."),
    _Topic("place", _PLACES, _ask("{x} 곳은", _WHERE) + _ask("{x} 곳을", _CALLED), "{x} 곳은 {a}입니다."),
)

# For each intent: the reply, a curt reply and keywords of an apt reply; then the prompts.
_SMALL_TALK = """
안녕하세요, 만나서 반갑습니다. | 어, 안녕 | 안녕하/안녕/반갑/반가
안녕하세요?/안녕?/안녕하십니까?/반가워요./만나서 반가워./처음 뵙겠습니다./만나서 반갑습니다.
천만에요, 도움이 되어 기쁩니다. | 천만에 | 천만에/도움이
고마워요./고마워!/감사합니다./정말 고맙습니다./도와줘서 고마워./알려 줘서 감사해요.
괜찮습니다, 마음 쓰지 마세요. | 됐어, 괜찮아 | 괜찮
미안해요./미안해./죄송합니다./늦어서 미안해./제가 실수했어요./정말 죄송해요.
많이 힘드셨겠어요, 푹 쉬세요. | 그럼 좀 쉬어 | 쉬/푹
오늘 너무 피곤해요./너무 지쳤어./일이 많아서 힘들어요./요즘 너무 힘들어./오늘 하루 종일 일했어.
정말 축하합니다, 잘됐네요. | 오, 축하해 | 축하/잘됐
시험에 합격했어요!/나 취직했어!/오늘 제 생일이에요./대회에서 상을 받았어요!/드디어 졸업했어!
속상하시겠어요, 기운 내세요. | 기운 내 | 속상/기운
너무 슬퍼요./우울해./시험에 떨어졌어요./친구와 싸웠어./오늘 너무 속상해요.
안녕히 주무세요, 좋은 꿈 꾸세요. | 그래, 잘 자 | 안녕히 주무/잘 자/좋은 꿈
잘 자요./이제 잘게./안녕히 주무세요./졸려서 자야겠어요./나 먼저 잔다.
안녕히 가세요, 또 만나요. | 그래, 잘 가 | 안녕히 가/잘 가/또 만나
잘 있어요./이제 갈게./안녕히 계세요./먼저 가 볼게요./다음에 또 봐요.
맛있는 음식을 드셔 보세요. | 뭐라도 먹어 | 맛있/먹/드셔
배고파요./너무 배고파./배가 고프네요./아침을 못 먹었어요./점심을 굶었어.
병원에 가서 진료를 받아 보세요. | 병원 가 | 병원/진료
머리가 아파요./배가 아파./감기에 걸렸어요./열이 나요./몸이 안 좋아.
저는 한국어로 답하는 챗봇입니다. | 나 챗봇이야 | 챗봇
누구세요?/넌 누구야?/자기소개를 해 주세요./당신은 누구인가요?/너는 사람이야?
따뜻한 옷을 입고 나가세요. | 옷 따뜻하게 입어 | 따뜻/옷
오늘 너무 추워요./날씨가 춥네요./너무 추워./손이 시려요./밖에 눈이 와서 추워.
"""


def _small_talk_facts() -> list[Fact]:
    lines = _SMALL_TALK.strip().splitlines()
    intents = [line.split(" | ") for line in lines[::2]]
    return [
        Fact(
            domain="small_talk",
            prompts=tuple(prompts.split("/")),
            answers=tuple(keywords.split("/")),
            full=reply,
            wrongs=tuple(other for other, *_ in intents if other != reply),
            curts=(curt, f"{curt}."),
        )
        for (reply, curt, keywords), prompts in zip(intents, lines[1::2], strict=True)
    ]


def all_facts() -> list[Fact]:
    """Every fact of every topic, in a fixed order."""
    return [fact for topic in _TOPICS for fact in topic.facts()] + _small_talk_facts()
