"""The indefinite article: "a" or "an" before a noun, as far as rules go."""

import re

NEEDS_NO_ARTICLE = frozenset({
    "binoculars", "brass", "broccoli", "carbonara", "chain mail", "chocolate sauce", "consomme", "dough", "eggnog",
    "face powder", "guacamole", "hair spray", "hay", "mashed potato", "parallel bars", "red wine", "sunglasses",
    "sunscreen", "swimming trunks", "thatch", "toilet tissue", "velvet", "wool",
})  # fmt: skip
"""Names of substances and pairs, which take no "a"."""

SPELLED = re.compile(r"[A-Z](?![a-z])")
"""The beginning of words whose first letter is said by its name, as in X-ray and CD player."""
CONSONANT_SOUND = re.compile(r"eu|ewe|uni(?![dmn])|u[bfkrst][aeiou]|one\b|once\b", re.IGNORECASE)
"""The beginning of words with a vowel that sounds like a consonant: European, unicorn, utensil, one-armed."""
VOWEL_SOUND = re.compile(r"[aeiou]|hour|honest|hono|heir", re.IGNORECASE)
"""The beginning of other words that sound as if they began with a vowel."""
HAS_DETERMINER = re.compile(r"(a|an|the|some|many|two|three|his|her|their|my)\b", re.IGNORECASE)
"""The beginning of texts that need no article besides."""
NOT_COUNTED = re.compile(r".*([^s]s|ity|ness|ence|ance|ing|ism|water|snow|sand|grass|fire|smoke|blood)", re.IGNORECASE)
"""Plurals, and nouns that are not counted."""


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun, by its sound as far as rules go; nothing before what takes neither."""
    if noun in NEEDS_NO_ARTICLE:
        return noun
    if SPELLED.match(noun):
        vowel = noun[0] in "AEFHILMNORSX"
    else:
        vowel = bool(VOWEL_SOUND.match(noun)) and not CONSONANT_SOUND.match(noun)
    return f"{'an' if vowel else 'a'} {noun}"


def with_article_if_needed(text: str) -> str:
    """Puts an article before what somebody wrote, unless it has one, is a name in capitals, a plural or not counted."""
    if HAS_DETERMINER.match(text) or text[:1].isupper() or NOT_COUNTED.fullmatch(text):
        return text
    return with_article(text)
