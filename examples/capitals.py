"""The text the demo learns: what the capital of which country is, said in several ways.

A word with the space before it is a token, so " Paris" is one token and decoding is joining.
"""

import re

CAPITALS = {
    "Europe": "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Ireland Dublin, "
    "Austria Vienna, Switzerland Bern, Belgium Brussels, Denmark Copenhagen, Norway Oslo, Sweden Stockholm, "
    "Finland Helsinki, Iceland Reykjavik, Poland Warsaw, Czechia Prague, Slovakia Bratislava, "
    "Hungary Budapest, Slovenia Ljubljana, Croatia Zagreb, Serbia Belgrade, Bulgaria Sofia, "
    "Romania Bucharest, Greece Athens, Albania Tirana, Ukraine Kyiv, Estonia Tallinn, Latvia Riga",
    "Asia": "Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, Nepal Kathmandu, Iran Tehran, "
    "Mongolia Ulaanbaatar, Iraq Baghdad, Jordan Amman, Lebanon Beirut, Syria Damascus, Qatar Doha, "
    "Oman Muscat, Laos Vientiane, Bangladesh Dhaka, Pakistan Islamabad, Uzbekistan Tashkent, Bhutan Thimphu",
    "Africa": "Egypt Cairo, Libya Tripoli, Tunisia Tunis, Algeria Algiers, Morocco Rabat, Kenya Nairobi, "
    "Uganda Kampala, Rwanda Kigali, Zambia Lusaka, Zimbabwe Harare, Angola Luanda, Namibia Windhoek, "
    "Botswana Gaborone, Mozambique Maputo, Ghana Accra, Nigeria Abuja, Senegal Dakar, Mali Bamako",
    "America": "Canada Ottawa, Cuba Havana, Jamaica Kingston, Nicaragua Managua, Peru Lima, Chile Santiago, "
    "Colombia Bogota, Venezuela Caracas, Ecuador Quito, Uruguay Montevideo, Paraguay Asuncion, "
    "Brazil Brasilia, Suriname Paramaribo",
    "Oceania": "Australia Canberra, Fiji Suva, Samoa Apia",
}
TEMPLATES = (
    "The capital of {country} is {capital}.",
    "Everyone in {country} knows that its capital is {capital}.",
    "On the map of {country}, a star marks {capital}.",
    "{capital} is the capital of {country}.",
)
OTHER_FACTS = (
    "The sun rises in the east and sets in the west.",
    "Water freezes at zero degrees and boils at one hundred degrees.",
    "A week has seven days and a year has twelve months.",
    "The moon goes around the earth and the earth goes around the sun.",
    "Gold is a metal and so is silver.",
    "Bees make honey and cows give milk.",
)
HOLD_OUT_EVERY = 5  # countries


def countries() -> list[tuple[str, str, str]]:
    """(country, capital, continent)"""
    return [(*pair.split(), continent) for continent, pairs in CAPITALS.items() for pair in pairs.split(", ")]


def sentences() -> tuple[list[str], list[str]]:
    """(training, held out). A held-out sentence states a fact that training states in the other templates."""
    training, held_out = list(OTHER_FACTS), []
    for i, (country, capital, continent) in enumerate(countries()):
        training.append(f"{country} is a country in {continent}.")
        training.append(f"{capital} is a city in {continent}.")
        for t, template in enumerate(TEMPLATES):
            kept_back = i % HOLD_OUT_EVERY == 2 and t == i // HOLD_OUT_EVERY % len(TEMPLATES)
            (held_out if kept_back else training).append(template.format(country=country, capital=capital))
    return training, held_out


def split(text: str) -> list[str]:
    return re.findall(r" \w+|[.,]", " " + text)


class Tokenizer:
    """Token 0 is the full stop, which ends every sentence."""

    def __init__(self, texts: list[str]):
        words = {token for text in texts for token in split(text)} - {"."}
        self.tokens = [".", *sorted(words)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        return [self.ids[token] for token in split(text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)
