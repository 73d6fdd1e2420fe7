"""Keep secrets out of whatever is shown, and people out of what is learnt from.

`redact` is for reports, manifests and a tracker's configuration; `redact_personal` for what people have written.
"""

from __future__ import annotations

import re

REDACTED = "<redacted>"  # in brackets it would be a list in YAML
EMAIL, PHONE = "<e-mail>", "<phone>"

# Names of secrets, and no more: `pad_token` and `max_new_tokens` are ordinary settings.
_NAME = (
    r"(?:[\w.-]*(?:api|access|auth|bearer|hub|hf|private|secret|wandb)[_-]?(?:token|key)|hf[_-]?hub[_-]?token"
    r"|[\w.-]*(?:password|passwd|secret|credentials?)|(?:proxy-)?authorization)"
)
_NAMED = re.compile(
    rf"(?i)(?P<name>(?<![\w.-]){_NAME}(?P<json>\\?[\"'])?[ \t]*[:=][ \t]*)"
    r"(?:(?P<quote>\\?[\"'])(?P<quoted>[^\n]*?)(?P=quote)"
    r"|(?P<bare>(?:(?:basic|bearer)[ \t]+)?(?:(?!,[\s\"'])[^\s{}\[\]\"'\\])+))"
)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bwandb_v\d_\w{16,}|\bA(?:KI|SI)A[A-Z0-9]{16}\b|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
    r"|\bAIza[A-Za-z0-9_-]{35}|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bglpat-[A-Za-z0-9_-]{20,}|\bnpm_[A-Za-z0-9]{36}"
    r"|\b[spr]k_(?:live|test)_[A-Za-z0-9]{16,}|\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r"|-----BEGIN (?P<kind>[A-Z ]*PRIVATE KEY(?: BLOCK)?)-----(?s:.*?)(?:-----END (?P=kind)-----|\Z)"
    r"|(?i:(?<=bearer ))[A-Za-z0-9._~+/=-]{16,}|(?:(?<=[?&]key=)|(?<=[?&]token=)|(?<=[?&]sig=))[^\s&#\"']+"
)
_EMPTY = {"", "null", "none", "~", "true", "false"}

# Letters of any script, digits and marks; a domain's last part has no digits, unlike the end of a price.
_LOCAL = r"(?<![\w.+-])(?:\"[^\"\n@]{1,64}\"|[\w!#$%&'*+/=?^`{|}~-][\w.!#$%&'*+/=?^`{|}~-]{0,63})"
_LABEL, _TOP = r"[^\W_](?:[\w-]{0,61}[^\W_])?", r"(?:[^\W\d_]{2,24}|xn--[a-z0-9-]{2,59})"
# With spaces round the @, or with words for signs, the end must be well known: `A @ B.transpose()` is a product.
_KNOWN_TOP = (
    r"(?:com|org|net|edu|gov|mil|int|info|biz|name|io|ai|app|dev|me|tv|co|eu|us|uk|de|fr|es|it|nl|be|ch|at|se|no|dk|fi"
    r"|pl|cz|pt|ie|gr|ro|hu|ru|ua|tr|il|in|pk|cn|jp|kr|tw|hk|sg|th|id|my|ph|vn|au|nz|za|ng|ke|eg|br|mx|ar|cl|ca)\b"
)
_SIGN = r"(?:[@\uff20\ufe6b]|%40)"
_AT = r"[ \t]{0,3}(?:[(\[{<][ \t]*(?:at|@|ät)[ \t]*[)\]}>]|&\#64;|&commat;)[ \t]{0,3}"
_DOT = r"[ \t]{0,3}(?:[(\[{<][ \t]*(?:dot|punkt|\.)[ \t]*[)\]}>]|[ \t]dot[ \t])[ \t]{0,3}"
_NAME_PART = r"(?<![\w.+-])[\w.+-]{1,64}"
_EMAIL = re.compile(
    rf"(?i)(?!git@[\w.-]+:)(?:mailto:)?{_LOCAL}{_SIGN}"
    rf"(?:(?:{_LABEL}[.\uff0e])+{_TOP}|\[(?:\d{{1,3}}\.){{3}}\d{{1,3}}\])(?![\w-])"
    rf"|{_NAME_PART}(?:{_AT}|[ \t]+{_SIGN}[ \t]+)(?:{_LABEL}(?:{_DOT}|\.))+{_KNOWN_TOP}"
    rf"|{_NAME_PART}(?:{_DOT}{_LABEL}){{0,3}}(?:[ \t]+at[ \t]+|{_AT}|[ \t]*{_SIGN}[ \t]*)"
    rf"(?:{_LABEL}{_DOT})+{_KNOWN_TOP}"
)

_NOT_WITHIN = r"(?<![\w$€£¥₹#.,/+-])"  # a longer number, a price, an address of the web
_NO_MORE = r"(?![ \t]*[$€£¥₹%]|[.,:/-]?\w)"
_EXTENSION = r"(?:[ ,]{1,2}(?:ext\.?|extension|x)[ .]?\d{1,5})?"
_PHONE = re.compile(
    rf"{_NOT_WITHIN}(?:"
    r"\+[1-9](?:[ ./()-]{0,2}\d){1,14}"  # +44 (0)20 7946 0958
    r"|00[1-9]\d{0,2}[ /-](?:\(0\))?(?=(?:[ ./()-]{0,2}\d){4})[ ./()-]{0,2}\d\d"
    r"(?:\d|[ ./()-]{1,2}\d\d){1,11}"  # 0049 30 1234567, 0044 (0)20 7946 0958
    r"|(?:1[ .-])?(?:\([2-9]\d\d\)[ -]?|[2-9]\d\d(?P<sign>[.-]))[2-9]\d\d[ .-]\d{4}"  # (202) 555-0143, 202-555-0143
    r"|(?:\(0[1-9]\d{1,3}\)|0[1-9]\d{1,3})[ /-]{1,3}(?:\d{3,5}[ -]\d{3,5}|\d{5,8})"  # 030 1234567, (020) 7946 0958
    r"|(?<!\d[ .-])0[1-9](?P<between>[ .-])\d\d(?:(?P=between)\d\d){3}(?![ .-]?\d)"  # 06 12 34 56 78
    r"|(?<!=)(?<!isbn[ :-])(?<!isbn: )(?<!isbn-10 )(?<!isbn-10: )0[1-9]\d{8,9}"  # 07700900123
    rf"){_EXTENSION}{_NO_MORE}",
    re.IGNORECASE,
)
_NAMED_PHONE = re.compile(
    r"(?P<name>\b(?:(?:tele|cell)?(?:phone|fon|fax|mobile|cell|tel|call|dial|ring|sms|text|whats[ -]?app|hotline)s?"
    r"|(?:reach|contact)[ \t](?:me|us|him|her|them|number)|(?:my|your|his|her|our|their)[ \t]number)\b[.)]?"
    r"(?:[ \t]*(?:numbers?|no\b\.?|nr\b\.?|phone|me|us|him|her|them|my|at|on|under|via|is|'s|:|=|\#)){0,4}[ \t]*)"
    rf"(?P<number>(?:\+|\()?\d(?:[ ./()-]{{0,2}}\d){{6,14}}{_EXTENSION})(?![ ]?\d){_NO_MORE}",
    re.IGNORECASE,
)
# Thousands, a decimal, a round number, digits in a row or in order; and what holds a date or two years.
_ORDINARY = re.compile(
    r"\+?[1-9]\d{0,2}([ .])\d{3}(?:\1\d{3})*|\+?\d+\.\d+|\d+0000|(?:\D*\b\d\b){3}.*|0\d(?:\D0\d)+|0123456789|0987654321"
    r"|(?!\+).*\b(?:(?<!\d[-/.])[0-3]?\d([-/.])[0-3]?\d\2(?:\d\d|YEAR)(?!\2\d)|YEAR([-/.])[01]?\d\3[0-3]?\d"
    r"|[0-3]\d [0-3]\d YEAR|YEAR ?[-/] ?YEAR)\b.*".replace("YEAR", r"(?:1[5-9]|20)\d\d")
)
_FEWEST_DIGITS, _MOST_DIGITS = 7, 15
_FEWEST_UNSPACED = 9  # digits in one piece, in front of which nothing but "call" or "phone" stands


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return re.fullmatch(_NAME, name, re.IGNORECASE) is not None


def redact(text: str) -> str:
    """`text` without the values of names of secrets (`hub_token: ...`) and without keys of well-known forms.

    JSON stays JSON, and YAML stays YAML.
    """

    def named(match: re.Match[str]) -> str:
        value = match["quoted"] if match["quote"] else match["bare"]
        if value.lower() in _EMPTY:
            return match[0]
        quote = match["quote"] or match["json"] or ""  # a number of a JSON object becomes text: it stays JSON
        return f"{match['name']}{quote}{REDACTED}{quote}"

    return _VALUE.sub(REDACTED, _NAMED.sub(named, text))


def redact_personal(text: str) -> str:
    """What someone has written, without keys, e-mail addresses and phone numbers.

    Secrets are those of `redact`; a name like `password` may stand before a type or a call in code, and "secret" before
    a count, so that a value without quotes must have a digit, and be more than a number of up to three. Addresses are
    also found with words or signs for "@" and "." (`ann (at) site dot org`). A phone number has a country's code, an
    area's code in brackets or with a 0, or the form 202-555-0143; any other must follow words such as "call" or "my
    number is". Numbers, prices, dates and times stay.
    """

    def named(match: re.Match[str]) -> str:
        plain = match["quote"] is None and re.fullmatch(r"\D*|\d{1,3}[^\w\s]*", match["bare"]) is not None
        return match[0] if plain else redact(match[0])

    text = _VALUE.sub(REDACTED, _NAMED.sub(named, text))
    text = _EMAIL.sub(EMAIL, text)
    text = _NAMED_PHONE.sub(lambda match: match["name"] + _phone(match["number"], match["name"]), text)
    return _PHONE.sub(lambda match: _phone(match[0]), text)


def _phone(found: str, name: str | None = None) -> str:
    """What stands for something that has the form of a phone number: `PHONE`, unless it is an ordinary number."""
    number = re.split(r"[ ,]+[ex]", found, maxsplit=1, flags=re.IGNORECASE)[0]
    count = sum(character.isdigit() for character in number)
    if _ORDINARY.fullmatch(number) or not _FEWEST_DIGITS <= count <= _MOST_DIGITS:
        return found
    alone = name is not None and re.fullmatch(r"\w+\s*", name) is not None
    few = _FEWEST_UNSPACED if alone or number.startswith("+") else _FEWEST_DIGITS
    return found if number.lstrip("+").isdigit() and count < few else PHONE
