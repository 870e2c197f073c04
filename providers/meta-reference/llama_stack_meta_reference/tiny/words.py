"""The words that the tiny model's cases are made of, split into those for training and those held out.

The split is a property of the word itself (a checksum), so that no list has to be kept twice and a pseudo-word that was
never written down has its side too: what a held-out case names cannot have stood in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 5
"""One word in this many is held out."""

T = TypeVar("T")


def split_of(text: str) -> Split:
    """The side on which ``text`` stands, whatever its case: ``held_out`` for one text in five."""
    return "held_out" if zlib.crc32(text.lower().encode()) % HELD_OUT_SHARE == 0 else "train"


class Words:
    """Draws names, nouns and values of one split; every draw comes from ``random``, so a seed settles them all."""

    def __init__(self, random_source: random.Random, split: Split, *, is_wide: bool = False) -> None:
        self.random = random_source
        self.split = split
        self.is_wide = is_wide
        """Whether cases are to be harder than those that are measured, as they are in the first part of training."""

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of ``options``, of either split."""
        return options[int(self.random.random() * len(options))]

    def own(self, options: Sequence[str]) -> str:
        """One of ``options`` that belongs to this split."""
        return self.until(lambda: self.choice(options))

    def until(self, draw: Callable[[], str]) -> str:
        """Repeat ``draw`` until what it gives belongs to this split."""
        while True:
            text = draw()
            if split_of(text) == self.split:
                return text

    def pseudo(self, syllables: int | None = None) -> str:
        """A pronounceable lower-case word that means nothing."""
        if syllables != 1 and self.chance(0.5):
            return self.until(self._blend)
        return self.until(lambda: self._syllables(syllables or self.choice((1, 2, 2, 2))))

    def _syllables(self, count: int) -> str:
        word = "".join(self.choice(_ONSETS) + self.choice(_VOWELS) for _ in range(count)) + self.choice(_CODAS)
        return word if len(word) > 2 else word + "n"

    def _blend(self) -> str:
        """The head of one word and the tail of another: cut into the same pieces as words that were never seen."""
        head, tail = self.own(_BLENDED).lower(), self.own(_BLENDED).lower()
        return head[: self.choice((2, 3, 3, 4))] + tail[-self.choice((2, 3, 3, 4)) :]

    def name(self) -> str:
        """A capitalised pseudo-word."""
        return self.pseudo().capitalize()

    def person(self) -> str:
        """A full name."""
        first = self.own(FIRST_NAMES) if self.chance(0.5) else self.name()
        last = self.own(SURNAMES) if self.chance(0.3) else self.name()
        return f"{first} {last}"

    def first_name(self) -> str:
        """A given name."""
        return self.own(FIRST_NAMES) if self.chance(0.5) else self.name()

    def city(self) -> str:
        """The name of a town, real or not."""
        return self.own(CITIES) if self.chance(0.5) else self.name()

    def noun(self) -> str:
        """A common noun or, one time in four, a pseudo-word."""
        return self.own(NOUNS) if self.chance(0.75) else self.pseudo(2)

    def number(self) -> int:
        """A whole number of one to four digits."""
        return self.random.randrange(1, 10 ** self.choice((1, 2, 2, 3, 4)))

    def decimal(self) -> float:
        """A number with one or two decimals, the last of them not zero."""
        if self.chance(0.5):
            return self.random.randrange(0, 1000) + self.random.randrange(1, 10) / 10
        return (self.random.randrange(0, 10000) * 10 + self.random.randrange(1, 10)) / 100

    def year(self) -> str:
        """A year between 1700 and 2039."""
        return str(self.random.randrange(1700, 2040))

    def date(self) -> str:
        """A day, in one of three ways of writing."""
        month = self.random.randrange(12)
        day = self.random.randrange(1, 29)
        form = self.random.random()
        if form < 0.4:
            return f"{day} {MONTHS[month]}"
        if form < 0.7:
            return self.choice(DAYS)
        return f"{self.random.randrange(1990, 2040)}-{month + 1:02}-{day:02}"

    def clock(self) -> str:
        """A time of day."""
        return f"{self.random.randrange(24):02}:{self.random.randrange(0, 60, 5):02}"

    def code(self) -> str:
        """An identifier of letters and digits."""
        letters = "".join(self.choice(_LETTERS) for _ in range(self.choice((1, 2, 2, 3))))
        return f"{letters}{self.choice(('-', '-', ''))}{self.random.randrange(10, 10 ** self.choice((2, 3, 4)))}"

    def price(self) -> str:
        """An amount of money."""
        amount: int | float = self.number() if self.chance(0.6) else self.decimal()
        return f"{amount} {self.choice(CURRENCIES)}"

    def quantity(self) -> str:
        """A number with a unit."""
        return f"{self.number()} {self.choice(UNITS)}"

    def phrase(self) -> str:
        """Two or three words that name a thing."""
        first = self.choice(ADJECTIVES) if self.chance(0.6) else self.pseudo(2)
        return f"{first} {self.noun()}" if self.chance(0.8) else f"{first} {self.noun()} {self.noun()}"

    def title(self) -> str:
        """A capitalised phrase, such as a book or a company has."""
        return " ".join(word.capitalize() for word in self.phrase().split())

    def value(self) -> str:
        """Any of the kinds of text above, as the value of something."""
        draw = self.choice(
            (
                *(self.name, self.name, self.person, self.city, self.phrase, self.noun, self.date, self.clock),
                *(self.code, self.price, self.quantity, self.title, self.pseudo),
            )
        )
        return draw()


def _list(text: str) -> list[str]:
    return text.split()


_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_ONSETS = [*_list("b br c ch cl d dr f fl g gl gr h j k kr l m n p pl pr r s sh sk sl sp st t th tr v w y z"), ""]
_VOWELS = _list("a a e e i i o o u ai ea ee ie oa oo ou y")
_CODAS = ["", "", "", *_list("b ck d ft g k l ld ll m n n nd ng nt p r rd rk rn s sk ss st t th x z")]

MONTHS = _list("January February March April May June July August September October November December")
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow tonight")
CURRENCIES = ("euros", "dollars", "pounds", "yen", "EUR", "USD", "francs", "crowns")
UNITS = _list(
    "metres kilometres kilograms grams litres hours minutes seconds pages seats rooms degrees miles tonnes watts"
)

FIRST_NAMES = _list("""
Ada Aisha Alan Alice Amara Amir Ana Anders Anna Anton Ben Bianca Bruno Carla Carlos Chen Clara Dana Daniel David Diego
Elena Eli Emil Emma Erik Eva Farid Felix Fiona Frida Grace Hana Hassan Hugo Ida Igor Ines Ivan Jack Jana Jin John Jonas
Jorge Julia Kai Karin Kofi Lars Laura Leila Leo Lina Luca Lucia Maria Marta Max Maya Mei Mia Mikel Mina Mona Nadia Nina
Noah Nora Olga Oliver Omar Oscar Paul Pedro Petra Priya Rafael Rania Ravi Rosa Ruth Sam Sara Sofia Stefan Sven Tariq
Tess Theo Tom Uma Vera Victor Wei Yara Yusuf Zoe
""")

SURNAMES = _list("""
Abbas Adams Ahmed Andersen Baker Bauer Becker Bell Berg Brown Carter Castro Chan Clark Cohen Cole Cruz Dahl Davis Diaz
Dubois Evans Fischer Flores Fox Garcia Gomez Gray Green Gupta Hall Hansen Harris Hill Hughes Ito Jensen Johnson Jones
Kato Keller Khan Kim King Klein Kumar Lane Larsen Lee Lewis Lopez Martin Mendez Meyer Miller Moore Morris Nakamura Ngo
Novak Okafor Olsen Ortiz Park Patel Perez Petrov Reed Reyes Rossi Sato Schmidt Shah Silva Singh Smith Stone Suzuki
Tanaka Taylor Torres Turner Vega Vogel Walker Wang Weber White Wolf Wood Wright Young Zhang
""")

CITIES = _list("""
Accra Amsterdam Athens Auckland Baku Bangkok Barcelona Beijing Berlin Bern Bogota Boston Brussels Budapest Cairo Chicago
Dakar Delhi Denver Dublin Florence Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London
Lyon Madrid Manila Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Ottawa Paris Porto
Prague Quito Riga Rome Rotterdam Santiago Seattle Seoul Seville Shanghai Singapore Sofia Stockholm Sydney Tallinn Tokyo
Toronto Tunis Turin Vienna Vilnius Warsaw Wellington Zagreb Zurich
""")

NOUNS = _list("""
account alarm album anchor apple archive arrow article asset atlas axle badge bakery balance ball banner barrel basket
battery beacon bed bell bench bike bill bird blanket blender board boat bolt book booking boot bottle bowl box bracket
branch bread brick bridge broom brush bucket budget bus button cabin cable cake calendar camera candle canvas car card
cargo carpet cart castle catalog ceiling chain chair chapter chart cheese chest circuit claim clock cloud club coat
coffee coin comet compass contact contract copper cotton coupon course crane crate credit crop crown cup curtain cushion
customer cycle dam deal deck delivery desk device diary dish dock document door draft drawer dress drill driver drum
echo egg elevator email engine entry envelope event exam exhibit fan farm feather fee fence ferry field file film filter
fire flag flask flight floor flour flower folder forest fork form fountain frame freight fridge fuel funnel furnace
garage garden gate gear glass globe glove grain grant graph grid group guest guitar hammer handle harbour hat heater
helmet hinge hotel hour house image index ink invoice island item jacket jar jewel job journal juice kettle key kitchen
kite knife label ladder lake lamp lantern leaf ledger lemon lens letter level library licence light lock log lunch
machine magnet mail map market mask match meal medal meeting melody member memo menu message meter mill mirror mixer
model module motor mountain museum music nail needle nest net network note notebook novel oil olive onion orbit order
oven package page paint palace panel paper parcel park parking part party passport pasture patch path patient payment
pearl pencil pepper permit phone photo piano picture pillow pilot pipe planet plant plate playlist plot poem policy pond
port portrait poster potato pound printer product profile project prize pump puzzle quarry queue quilt quiz radar radio
raft rail rain ranch range recipe record refund region reminder rent report reservoir review ribbon rice ring river road
robot rocket roof room root rope route rug saddle salary sale salt sample satellite scale schedule school score screen
script seat seed sensor service shed shelf shell shift ship shirt shoe shop shuttle signal silk silver sketch skirt sled
soap sock sofa soil song soup space speaker spice spoon spring stable stage stair stamp star station statue stone storm
story stove street student subscription sugar suit survey switch table tank tape target tariff task taxi tea team temple
tent theatre thread ticket tide tile timer tire token tool torch tower toy track trade trail train transfer tray tree
trip trophy truck tunnel turbine valley valve van vault vehicle venue village violin visa voice volcano voucher wagon
wallet wall warehouse watch water wave weather wheel whistle willow window wine wing winter wire wood wool word workshop
wrench yard zone
""")

ADJECTIVES = _list("""
amber ancient big blue bold bright broad calm clean clear clever cold cool dark deep dry early easy fast fine flat fresh
gentle golden grand green grey happy heavy high hollow hot huge kind large late light little local lonely long loud low
lucky main mild modern narrow neat new noisy northern old open pale plain polite proud pure quick quiet rapid rare red
ripe rough round royal sharp short silent silver simple slow small smart smooth soft solid southern special steep still
strong sunny sweet swift tall thick thin tidy tiny upper warm wet white wide wild wise wooden yellow young
""")

ARGUMENTS = _list("""
city country town street address region date day month year hour time start end name title author owner user email phone
message text subject topic query keyword category kind type color size weight height width length depth amount price
currency limit count number quantity level speed temperature unit source target origin destination room floor seat row
language format style mode status state reason note comment label tag group team member customer order product item code
key id version path file folder color priority rating score distance duration period interval rate angle radius volume
station platform airline hotel brand model genre artist album song channel device sensor zone branch port host value
""")

_BLENDED = (*NOUNS, *ADJECTIVES, *ARGUMENTS, *FIRST_NAMES, *SURNAMES, *CITIES)
