r"""Penn Treebank tokens, as pycocoevalcap's Java tokenizer makes them, in Python.

pycocoevalcap runs Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` and drops punctuation. Scores depend
on its every habit (`-lrb-` for a bracket, `st.` with its full stop, `a b` and `a. b` apart), so they are all here, found by
comparing with the Java program. The rules below make the same tokens of every caption of COCO, nocaps and Flickr.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

# ---- Characters ------------------------------------------------------------------------------------------------------
# The rules do not read the text but its outline, in which one character stands for all of its kind.
_LETTER, _MARK, _DIGIT, _SYMBOL, _SPACE, _DROPPED = "é", "\u0301", "٠", "§", "\u2003", "\1"

# Characters that the rules name and that therefore stand for themselves.
_NAMED = "\u0080\u0091\u0092\u0093\u0094\u0096\u0097\u00a0\u0082\u0084¢£¤«\u00ad»¼½¾\u058a٫٬‐‑–—―‘’‚‛“”„‟…‹›⁄₠€⅓⅔、"

# Combining marks that belong to a word; the others split words, a habit of the Java program with many scripts.
_WORD_MARKS = (
    "\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6\u0483-\u0487"
    "\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    "\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    "\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3\u0a01-\u0a03"
    "\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    "\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
# Symbols that are tokens; whatever is neither letter, digit, mark nor one of these (emoji, say) is dropped.
_SYMBOLS = (
    "\u00a1-\u00bf×÷\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b"
    "\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2023\u2030-\u203b"
    "\u203e-\u2042\u2070\u2074-\u207e\u2080-\u208e\u20a4\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012"
    "\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)


class _Outline(dict[int, str]):
    """For `str.translate`: each character outside ASCII to the one that stands for its kind."""

    def __missing__(self, character: int) -> str:
        self[character] = kind = self._kind(chr(character))
        return kind

    @staticmethod
    def _kind(character: str) -> str:
        category = unicodedata.category(character)
        if character.isascii() or character in _NAMED:
            return character
        if character > "\uffff":  # the Java program sees halves of a surrogate pair, and knows neither
            return _DROPPED
        if category.startswith("L"):
            return _LETTER
        if category == "Nd":
            return _DIGIT
        if re.match(f"[{_WORD_MARKS}]", character):
            return _MARK
        if re.match(f"[{_SYMBOLS}]", character):
            return _SYMBOL
        return _SPACE if category == "Zs" and character not in "\u1680\u202f\u205f" else _DROPPED


_outline = _Outline()

# ---- Pieces of rules -------------------------------------------------------------------------------------------------
_L = rf"(?:[A-Za-z{_LETTER}{_MARK}\u00ad]|&[aeiouAEIOU](?:acute|grave|uml);)"  # letter
_N = rf"[0-9{_DIGIT}]"  # digit
_X = rf"[A-Za-z0-9{_LETTER}{_DIGIT}]"  # letter or digit, but no mark
_GAP = rf"[ \u00a0{_SPACE}]"
_APOSTROPHE = "(?:['\u0092’]|&apos;)"
_QUOTE = "(?:['\u0092’`\u0091‘‛]|&apos;)"  # an apostrophe, also a badly typed one
_HYPHEN = "[-_\u058a‐‑]"

_WORD = rf"{_L}(?:{_L}|{_N})*(?:[.!?]{_L}(?:{_L}|{_N})*)*"  # dog, dog.A: a stop without a space does not end a word
_NUMBER = rf"(?:{_N}*(?:[.:,\u00ad٫٬]{_N}+)+|{_N}+)"  # 5, 3.5, .5, 1,000, 10:30
_PART = rf"(?:[dDoOlL]{_QUOTE}{_X})?{_X}+"  # dog, 3D, o'clock, l'eau
_PARTS = rf"{_PART}(?:{_HYPHEN}{_PART})*"  # t-shirt, 20-year-old, jack-o-lantern
_JOINED = r"[A-Z]+(?:(?:[+&]|&(?i:amp);)[A-Z]+)+"  # AT&T
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])*\."  # J., U.S., p.m.
_COUNTRIES = r"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))\."
_AUXILIARY = rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"
_URL_PATH = r"[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]"


def _any_case(words: str) -> str:
    return f"(?i:{'|'.join(words.split())})"


# Abbreviations keep their full stop. After these the next word may follow without a space: `Inc.a`.
_ENDING = "(?i:p?pt)[ey](?i:s?)|" + _any_case(
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri Al Ala Ariz Calif Colo Conn Ct "
    "Dak Fla Ga Ind Kan Kans Ky Md Mich Minn Mo Mont Neb Nev Okla Penn Tenn Va Vt Wis Wisc Wyo Assn Bancorp Bhd Bldg "
    "Co Corp Cos Inc Intl Ltd Plc Univ Blvd Bros Esq Est Etc Ext Jr Rd Rt Seq Sq Sr Sys Tel"
)
_STATES = "|".join(
    f"{state[0]}(?i:{state[1:]})" for state in "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
)  # only with a capital: `ill.` and `mass.` are words
_LEADING = "(?i:m)[ft](?i:g)|" + _any_case(
    "Adj Adm Adv Alex Assoc Asst Atty Attys Ave Brig Capt Cf Cie Cmdr Col Comdr Cpl Dept Det Dr Drs Elec Ens Ft Gen "
    "Gov Govs Hon Insp Invt Jos Lieut Lt Maj Messrs Mlle Mme Mr Mrs Ms Msgr Mt Natl Pfc Ph Pres Prof Profs Pvt Rep "
    "Reps Rev Sen Sens Sfc Sgt Spc St Ste Supt Supts Treas Vs Wm"
)
_NUMBERED = _any_case("Art Ca Fig Figs No Nos Op Pp Prop")  # only before a number
# After these an initial is not one: `the letter S. A sign`
_SENTENCE_STARTS = "(?=[A-Z])" + _any_case(
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One "
    "Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)


# ---- Rules -----------------------------------------------------------------------------------------------------------
# The longest match makes the token; of equally long ones that of the first rule. Where a pattern has a group, the token is
# the group, and the rest of the match only has to follow it.
_RULES = [
    re.compile(pattern)
    for pattern in [
        # Two words in one: can not, gon na, 't is
        r"(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na|('t)is|('t)was)",
        # Markup: <b>, </b>, <a href="x">, <!-- x -->, &mdash;
        r"""<(?:[!?][A-Za-z-][^>\n]*|/?[A-Za-z][\w:.-]*|[A-Za-z][\w:.-]*(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^'\n]*'|"[^"\n]*"))?)* */?) *>""",
        r"&(?i:amp|lt|gt|nbsp|mdash|ndash|md|ht|tl|ur|lr|qc|ql|qr|odq|cdq|quot|apos|#[0-9]+);",
        # Contractions: dog 's, is n't
        rf"({_WORD}){_AUXILIARY}",
        rf"((?i:[a-z\u00ad]*[a-mo-z])\u00ad*)(?i:n{_QUOTE}t)",
        # Words
        _WORD,
        # Words with an apostrophe: 'em, 'n', ol', c'mon, ma'am, Shi'ite, B'Gosh, y'all
        rf"(?i:{_APOSTROPHE}n{_APOSTROPHE}?|[ldj]{_APOSTROPHE}|dunkin{_APOSTROPHE}|somethin{_APOSTROPHE}|ol{_APOSTROPHE})",
        rf"(?i:{_APOSTROPHE}em|{_APOSTROPHE}till?|{_APOSTROPHE}cause|{_APOSTROPHE}[2-9]0s|c{_APOSTROPHE}mon)",
        rf"(?i:cap{_APOSTROPHE}n|c{_APOSTROPHE}est)|[A-HJ-XZn]{_QUOTE}{_L}{{2,}}|{_L}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_L}*",
        rf"([yY]{_APOSTROPHE}){_L}",
        # Contractions, their second halves: 's, n't
        rf"({_AUXILIARY})[^A-Za-z]",
        rf"(?i:(n{_QUOTE}t))[^A-Za-z]",
        # Addresses: http://a.org/b, a.com/b, me@a.com, #photo, @me
        rf"(?i:https?)://{_URL_PATH}",
        rf"(?:www\.(?:[^ \t\n\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}|(?:[^ \t\n\"`'<>|.!?(){{}},-_$]+\.)+(?:com|net|org|edu))(?:/{_URL_PATH})?",
        r"(?:&lt;|<)?[A-Za-z0-9][^ \t\n\u00a0\"<>|(){}]*@(?:[^ \t\n\u00a0\"<>|(){}.]+\.)*[^ \t\n\u00a0\"<>|(){}.]+(?:&gt;|>)?",
        rf"#{_L}+|@[A-Za-z_][A-Za-z_0-9]*",
        # Numbers: 12/25/2012, -5, 1,000, 10:30, 1 1/2, '90
        rf"{_N}{{1,2}}[-/]{_N}{{1,2}}[-/]{_N}{{2,4}}",
        rf"[-+]?{_NUMBER}",
        rf"(?:{_N}{{1,4}}[- \u00a0])?{_N}{{1,4}}(?:\\?/|⁄){_N}{{1,4}}",
        rf"({_APOSTROPHE}[0-9][0-9])(?:{_GAP}|\n)",
        r"[A-Z]*\$|#",
        # pro-, S&Ls, C#, either/or
        r"-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s|pro-|anti-)|S&Ls?|(?i:c\+\+|[cf]#)",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        # Abbreviations and initials: etc., Dr., No. 5, J., U.S.
        rf"((?:{_ENDING}|{_STATES})\.)(?s:..)",
        rf"(?:{_ENDING}|{_STATES}|{_LEADING})\.",
        rf"({_NUMBERED}\.){_GAP}?{_N}",
        rf"{_INITIALS}|{_COUNTRIES}",
        rf"([A-Za-z])\.(?:{_GAP}|\n)+{_SENTENCE_STARTS}(?:{_GAP}|\n)",
        # Files: 12.jpg (file.jpg is a word)
        rf"({_X}+(?:\.{_X}+)*\.(?i:bat|bmp|c|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py"
        rf"|sql|tar|txt|wav|x|xml|zip|[37][0-9]))(?:{_GAP}|[\n.?!,])",
        # A word before .,  .;  .: keeps the full stop
        rf"((?:{_WORD}|{_PARTS}|{_JOINED})\.)[,;:、]",
        # Telephones
        r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        # Faces
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
        r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
        # Punctuation
        r"-+|\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[?!]+|@+|#+|_+|\*+|(?:\\\*){1,3}|<<|>>",
        # Words of several parts: t-shirt, 3.5-inch, AT&T
        rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_COUNTRIES}|[A-Za-z]\.{_INITIALS}|[A-Za-z0-9\u00ad]+))+",
        _PARTS,
        _JOINED,
        # Quotes
        "''|[`\u0082\u0084\u0091-\u0094‘-‟‹›«»]{1,2}",
        # An apostrophe before a word opens a quotation, so 'nice is not 'n ice
        r"(')[A-Za-z][^ \t\n\u00a0]",
        _AUXILIARY,
        # Any other character one can see
        rf"[^\0- \x7f\u00a0٫٬֊‐‑{_SPACE}{_DROPPED}]",
    ]
]

# Most of a caption is words that only the rule for words can match: letters before a space, a comma or a final full stop.
_PLAIN = re.compile(
    rf"(?:(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)[ ,\n])[A-Za-z]++(?: *,? +|(?=\n))"
    rf"|(?!(?:{_ENDING}|{_STATES}|{_LEADING}|{_NUMBERED})\.)[A-Za-z]{{2,}}+ *\.(?: +|(?=\n)))*"
)

# ---- Writing ---------------------------------------------------------------------------------------------------------
_ESCAPES = str.maketrans({" ": "\u00a0", "(": "-lrb-", ")": "-rrb-", "\u00ad": None})
_SPELLED = {
    "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": "cents", "£": "#", **dict.fromkeys("¤€₠\u0080", "$"),
    '"': "''", "…": "...", **{gap.join("." * dots): "..." for gap in ("", "\u00a0") for dots in (3, 4, 5)},
    **dict.fromkeys(["---", "----", "&md;", "&mdash;", "&ndash;", *"\u0096\u0097–—―"], "--"),
}  # fmt: skip
# These tokens get straight quotes; in others, as in ma’am, quotes stay as they are.
_STRAIGHTENED = re.compile(rf"{_AUXILIARY}|n{_QUOTE}t|[`\u0091-\u0094‘-‟‹›«»]{{1,2}}", re.IGNORECASE)
_STRAIGHT = str.maketrans(
    {
        **dict.fromkeys("\u0091‘‛‹", "`"),
        **dict.fromkeys("\u0092’›", "'"),
        **dict.fromkeys("\u0093“«", "``"),
        **dict.fromkeys("\u0094”»", "''"),
    }
)
# What pycocoevalcap takes out. Its own list has -LRB- too, which never meets -lrb-: brackets count as words.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def _write(token: str) -> str:
    if _STRAIGHTENED.fullmatch(token):
        token = token.replace("&apos;", "'").translate(_STRAIGHT)
    elif token.replace("&amp;", "").isalpha():
        token = token.replace("&amp;", "&")
    token = token.lower().translate(_ESCAPES)
    return _SPELLED.get(token, token)


def tokenize(caption: str, following: str = "") -> str:
    return " ".join(_tokens(caption, following))


def _tokens(caption: str, following: str) -> Iterator[str]:
    text = "\n".join([re.sub(r"[\n\r\x0b\x0c\x85\u2028\u2029]", " ", caption), *following.split(None, 1)[:1], "\n"])
    outline = text if text.isascii() else text.translate(_outline)
    position = 0
    while position < len(caption):
        if plain := _PLAIN.match(text, position)[0]:
            yield from re.findall("[a-z]+", plain.lower())
            position += len(plain)
            continue
        matches = [match for rule in _RULES if (match := rule.match(outline, position))]
        if not matches:
            position += 1
            continue
        longest = max(matches, key=re.Match.end)
        start, position = position, longest.end(longest.lastindex or 0)
        token = _write(text[start:position])
        if token and token not in _PUNCTUATION:
            yield token
