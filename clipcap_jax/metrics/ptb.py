r"""Penn Treebank tokens exactly as pycocoevalcap's Java tokenizer makes them, in Python.

pycocoevalcap runs Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` and drops the punctuation. Every
score depends on that program's habits (`-lrb-` for a bracket, `st.` with its full stop), so they are all here, learnt
by comparing outputs. Known differences: letters and digits that Unicode gained after version 6.1 (2012) make words
here, while the Java program drops them; soft hyphens in addresses and hashtags go.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

# ---- Characters ------------------------------------------------------------------------------------------------------
# The rules read an outline of the text in which one character stands for all of its kind outside ASCII.
_LETTER, _MARK, _DIGIT, _SYMBOL, _SPACE, _DROPPED = "\u00e9", "\u0301", "\u0660", "\u00a7", "\u2003", "\1"

# Characters that mean something to the rules stand for themselves.
_LEFT_SINGLE, _RIGHT_SINGLE = "\u0091\u2018\u201b\u2039", "\u0092\u2019\u203a"
_LEFT_DOUBLE, _RIGHT_DOUBLE = "\u0093\u201c\u00ab", "\u0094\u201d\u00bb"
_DASHES = "\u0096\u0097\u2013\u2014\u2015"
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_CURRENCIES = {"\u0080": "$", "\u00a2": "cents", "\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$"}
_RAISED, _LOWERED = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079", "\u2080-\u2089"  # 2 in m2, 2 in H2O
_THEMSELVES = re.compile(
    rf"[\0-\x7f\u00a0\u00ad\u058a\u066b\u066c\u2010\u2011\u201a\u201e\u201f\u2026\u2044\u207a\u207b\u208a\u208b\u3001"
    rf"{_LEFT_SINGLE}{_RIGHT_SINGLE}{_LEFT_DOUBLE}{_RIGHT_DOUBLE}{_DASHES}{_RAISED}{_LOWERED}"
    rf"{''.join(_FRACTIONS)}{''.join(_CURRENCIES)}]"
)
# Combining marks that are part of a word. The others split it: the Java program does not know the script.
_MARKS = re.compile(
    r"[\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6\u0483-\u0487"
    r"\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    r"\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    r"\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3\u0a01-\u0a03"
    r"\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    r"\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd]"
)
# Symbols that are tokens. What is none of all these, such as emoji, is dropped and separates words.
_SYMBOLS = re.compile(
    r"[\u00a1-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614"
    r"\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2023"
    r"\u2030-\u203b\u203e-\u2042\u2074-\u207e\u2080-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff\u3002\u3012\u30fb"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)


class _Outline(dict[int, str]):
    """For `str.translate`: maps a code point to the character that stands for its kind."""

    def __missing__(self, code_point: int) -> str:
        self[code_point] = kind = self._kind(chr(code_point))
        return kind

    @staticmethod
    def _kind(character: str) -> str:
        category = unicodedata.category(character)
        if _THEMSELVES.match(character):
            return character
        if character > "\uffff":  # to Java two halves of a surrogate pair, neither of them a letter
            return _DROPPED
        if category.startswith("L"):
            return _LETTER
        if category == "Nd":
            return _DIGIT
        if _MARKS.match(character):
            return _MARK
        if _SYMBOLS.match(character):
            return _SYMBOL
        return _SPACE if re.match("[\u2000-\u200a\u3000]", character) else _DROPPED


_outline = _Outline()
_LINE_BREAKS = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")

# ---- Parts of rules --------------------------------------------------------------------------------------------------
_L = rf"(?:[A-Za-z{_LETTER}{_MARK}\u00ad]|&[aeiouAEIOU](?:acute|grave|uml);)"  # letter
_N = rf"[0-9{_DIGIT}]"  # digit
_C = rf"[A-Za-z0-9{_LETTER}{_DIGIT}]"  # letter or digit, but no mark
_GAP = rf"[ \u00a0{_SPACE}]"
_GAP_OR_END = rf"(?:{_GAP}|\n)"
_APOSTROPHE = r"(?:['\x92\u2019]|&apos;)"
_QUOTE = r"(?:['`\x91\x92\u2018\u2019\u201b]|&apos;)"  # an apostrophe, also a badly typed one
_QUOTES = rf"[`{_LEFT_SINGLE}{_RIGHT_SINGLE}{_LEFT_DOUBLE}{_RIGHT_DOUBLE}\u201a\u201e\u201f]{{1,2}}"
_HYPHEN = r"[-_\u058a\u2010\u2011]"

_WORD = rf"{_L}(?:{_L}|{_N})*(?:[.!?]{_L}(?:{_L}|{_N})*)*"  # dog, dog.A (a full stop without a space ends nothing)
_AUXILIARY = rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"  # 's, 're
_NOT = rf"(?i:n{_QUOTE}t)"  # n't
_PART = rf"(?:[dDoOlL]{_QUOTE}{_C})?{_C}+"  # dog, 3d, o'clock, l'eau
_PARTS = rf"{_PART}(?:{_HYPHEN}{_PART})*"  # t-shirt, 20-year-old
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])*\."  # J., U.S., p.m.
_COUNTRIES = r"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))"
# 3.5-inch, U.S.-made
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_COUNTRIES}\.|[A-Za-z]\.{_INITIALS}|[A-Za-z0-9\u00ad]+))+"
_JOINED = r"[A-Z]+(?:(?:[+&]|&(?i:amp);)[A-Z]+)+"  # AT&T
_NUMBER = rf"(?:{_N}*(?:[.:,\u00ad\u066b\u066c]{_N}+)+|{_N}+)"  # 5, 3.5, .5, 1,000, 10:30
_MAIL_HOST = r"[^ \t\n\u00a0\"<>|(){}.]+"
_URL_PATH = r"[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]"


def _any_case(words: str) -> str:
    return f"(?i:{'|'.join(words.split())})"


# Abbreviations keep their full stop. After these one more letter may follow at once: `etc.a` is two tokens.
_LAST = "|".join(
    [
        _any_case("Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri"),
        _any_case("Al Ala Ariz Calif Colo Conn Ct Dak Fla Ga Ind Kan Kans Ky Md Mich Minn Mo Mont Neb Nev Okla Penn"),
        _any_case("Tenn Va Vt Wis Wisc Wyo Assn Bancorp Bhd Bldg Blvd Bros Co Corp Cos Esq Est Etc Ext Inc Intl"),
        _any_case("Jr Ltd Plc Rd Rt Seq Sq Sr Sys Tel Univ"),
        r"(?i:p?pt)[ey](?i:s?)|(?i:ed|ph)\.[dD]",  # Pty., Pte., Ph.D.
        # With a capital only: `ill.` and `mass.` are words
        r"A(?i:rk|z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)",
    ]
)
_TITLES = "|".join(
    [
        _any_case("Adj Adm Adv Alex Assoc Asst Atty Attys Ave Brig Capt Cf Cie Cmdr Col Comdr Cpl Dept Det Dr Drs"),
        _any_case("Elec Ens Ft Gen Gov Govs Hon Insp Invt Jos Lieut Lt Maj Messrs Mlle Mme Mr Mrs Ms Msgr Mt Natl"),
        _any_case("Pfc Ph Pres Prof Profs Pvt Rep Reps Rev Sen Sens Sfc Sgt Spc St Ste Supt Supts Treas Vs Wm"),
        "(?i:m)[ft](?i:g)",  # Mfg., Mtg.
    ]
)
_NUMBERED = _any_case("Art Ca Fig Figs No Nos Op Pp Prop")  # only before a number
_SENTENCE_STARTS = "(?=[A-Z])" + _any_case(
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once "
    "One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
_FILE_TYPES = _any_case(
    "bat bmp c cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt wav x "
    "xml zip"
)

# ---- Rules -----------------------------------------------------------------------------------------------------------
# The longest match makes the token, of equally long ones that of the first rule. In a pattern with a group the group is
# the token; what matches after it must only follow, and is read again.
_RULES = [
    re.compile(pattern)
    for pattern in (
        # Two words in one
        r"(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na|('t)is|('t)was)",
        # Markup: <b>, </b>, <br />, <a href="x">, <!-- x -->, &amp;
        r"<(?:[!?][A-Za-z-][^>\n]*|/?[A-Za-z][\w:.-]*) *>",
        r"""<[A-Za-z][\w:.-]*(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^'\n]*'|"[^"\n]*"))?)* */? *>""",
        r"&(?i:amp|apos|cdq|gt|ht|lr|lt|md|mdash|nbsp|ndash|odq|qc|ql|qr|quot|tl|ur|#[0-9]+);",
        # Words; before 's and n't their first half: dog 's, is n't
        rf"({_WORD}){_AUXILIARY}",
        rf"((?i:[a-z\u00ad]*[a-mo-z])\u00ad*){_NOT}",
        _WORD,
        # With an apostrophe: 'n', d', dunkin', 'em, 'cause, '50s, c'mon, ma'am, Shi'ite, B'Gosh, n'est
        rf"(?i:{_APOSTROPHE}n{_APOSTROPHE}?|(?:[djl]|dunkin|ol|somethin){_APOSTROPHE})",
        rf"(?i:{_APOSTROPHE}(?:em|till?|cause|[2-9]0s)|c'mon|cap{_APOSTROPHE}n|c{_APOSTROPHE}est|o{_QUOTE}o)",
        r"(?i:e'er|ev'ry|li'l|nat'l|s'mores)",
        rf"{_L}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_L}*|[A-HJ-XZn]{_QUOTE}{_L}{{2,}}",
        rf"([yY]{_APOSTROPHE}){_L}",
        rf"({_AUXILIARY})[^A-Za-z]",
        rf"({_NOT})[^A-Za-z]",
        # Addresses: https://a.org/b, www.a.org/b, a@b.org, #photo, @me
        rf"(?i:https?)://{_URL_PATH}",
        rf"www\.(?:[^ \t\n\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}(?:/{_URL_PATH})?",
        rf"(?:[^ \t\n\"`'<>|.!?(){{}},-_$]+\.)+(?:com|net|org|edu)(?:/{_URL_PATH})?",
        rf"(?:&lt;|<)?[A-Za-z0-9][^ \t\n\u00a0\"<>|(){{}}]*@(?:{_MAIL_HOST}\.)*{_MAIL_HOST}(?:&gt;|>)?",
        rf"#{_L}+|@[A-Za-z_][A-Za-z_0-9]*",
        # Numbers: 12/25/2012, -5, 1 1/2, m2 with a raised 2, '90, US$
        rf"{_N}{{1,2}}[-/]{_N}{{1,2}}[-/]{_N}{{2,4}}",
        rf"[-+]?{_NUMBER}",
        rf"(?:{_N}{{1,4}}[- \u00a0])?{_N}{{1,4}}(?:\\?/|\u2044){_N}{{1,4}}",
        rf"[\u207a\u207b\u208a\u208b]?(?:[{_RAISED}]+|[{_LOWERED}]+)",
        rf"({_APOSTROPHE}[0-9][0-9]){_GAP_OR_END}",
        r"[A-Z]*\$|#",
        # Oddities: -LRB-, C.D.s, pro-, S&Ls, C#, either/or
        r"-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s|pro-|anti-|c\+\+|[cf]#)|S&Ls?",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        # Abbreviations: etc., Dr., No. 5, U.S., but `the letter S. A sign`
        rf"((?:{_LAST})\.)(?s:..)",
        rf"(?:{_LAST}|{_TITLES})\.",
        rf"({_NUMBERED}\.){_GAP_OR_END}?{_N}",
        rf"{_INITIALS}|{_COUNTRIES}\.",
        rf"({_COUNTRIES}){_GAP_OR_END}",
        rf"([A-Za-z])\.{_GAP_OR_END}+{_SENTENCE_STARTS}{_GAP_OR_END}",
        # Files: 12.jpg (dog.jpg is a word as it is)
        rf"({_C}+(?:\.{_C}+)*\.{_FILE_TYPES})(?:{_GAP}|[\n.?!,])",
        # Before another mark every word keeps its full stop: `dog.,`
        rf"((?:{_WORD}|{_PARTS}|{_HYPHENATED}|{_JOINED})\.)[,;:\u3001]",
        # Telephones: (555) 123-4567, 555 1234 567, 1.555.123.4567
        r"\([0-9]{2,3}\)[ \u00a0]?[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        r"(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0][0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        # Faces: :-), ^_^, (^.^)
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
        r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
        # Repeated marks
        r"-+|\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[?!]+|@+|#+|_+|\*+|(?:\\\*){1,3}|<<|>>",
        # Words of several parts
        _HYPHENATED,
        _PARTS,
        _JOINED,
        # Quotes. An apostrophe before a word opens a quotation: 'nice, not 'n ice.
        rf"''|{_QUOTES}",
        r"(')[A-Za-z][^ \t\n\u00a0]",
        _AUXILIARY,
        # Any other visible character
        rf"[^\0- \x7f\u00a0\u066b\u066c\u058a\u2010\u2011{_SPACE}{_DROPPED}]",
    )
]
# Most of a caption is words that no rule but `_WORD` can match, so they need not be tried with all: letters before a
# space, a comma or a full stop that is no abbreviation's.
_PLAIN_WORDS = re.compile(
    r"(?:(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)[^A-Za-z])(?:[A-Za-z]++(?: *,? +|(?=\n))"
    rf"|(?!(?:{_LAST}|{_TITLES}|{_NUMBERED})\.)[A-Za-z]{{2,}}+ *\.(?: +|(?=\n))))*"
)

# ---- Writing ---------------------------------------------------------------------------------------------------------
_CHARACTERS = str.maketrans({" ": "\u00a0", "(": "-lrb-", ")": "-rrb-", "\u00ad": None})
_TOKENS = {
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": "''",
    "&apos;": "'",
    "&nbsp;": "",
    '"': "''",
    "\u2026": "...",
    **_FRACTIONS,
    **_CURRENCIES,
    **dict.fromkeys(["---", "----", "&md;", "&mdash;", "&ndash;", *_DASHES], "--"),
    **{gap.join("." * dots): "..." for gap in ("", "\u00a0") for dots in (3, 4, 5)},
}
# Contractions and quotes get straight quotes; other words keep theirs.
_STRAIGHTENED = re.compile(rf"{_AUXILIARY}|{_NOT}|{_QUOTES}")
_STRAIGHT = str.maketrans(
    {
        **dict.fromkeys(_LEFT_SINGLE, "`"),
        **dict.fromkeys(_RIGHT_SINGLE, "'"),
        **dict.fromkeys(_LEFT_DOUBLE, "``"),
        **dict.fromkeys(_RIGHT_DOUBLE, "''"),
    }
)
# What pycocoevalcap takes out. It lists -LRB- too, but meets -lrb-: brackets count as words.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def _write(token: str) -> str:
    if _STRAIGHTENED.fullmatch(token):
        token = token.replace("&apos;", "'").translate(_STRAIGHT)
    elif token.replace("&amp;", "").isalpha():  # A&amp;M
        token = token.replace("&amp;", "&")
    token = token.lower().translate(_CHARACTERS)
    return _TOKENS.get(token, token)


def tokenize(caption: str, following: str = "") -> str:
    """The caption's tokens without punctuation, in lower case, joined by spaces; "" where there are none.

    Some tokens hold a no-break space ("1 1/2"), at which `str.split()` splits and `str.split(" ")` does not.

    Args:
      caption: any text; line breaks count as spaces.
      following: the caption after it. pycocoevalcap hands Java all captions as one text, in which the last word of
          "the letter S." reads "s" before "A sign" and "s." before "Two signs". `tokenize_all` sees to it.
    """
    return " ".join(_tokens(caption, following))


def tokenize_all(captions: Sequence[str]) -> list[str]:
    """`tokenize` for each caption, in the order in which pycocoevalcap would get them."""
    return list(map(tokenize, captions, [*captions[1:], ""]))


def _tokens(caption: str, following: str) -> Iterator[str]:
    text = _LINE_BREAKS.sub(" ", caption) + "\n" + following + "\n"
    outline = text if text.isascii() else text.translate(_outline)
    position = 0
    while position < len(caption):
        start = position
        plain_words = _PLAIN_WORDS.match(outline, start)
        if plain_words and plain_words[0]:
            yield from re.findall("[a-z]+", plain_words[0].lower())
            position = plain_words.end()
        elif matches := [match for rule in _RULES if (match := rule.match(outline, start))]:
            longest = max(matches, key=re.Match.end)
            position = longest.end(longest.lastindex or 0)
            token = _write(text[start:position])
            if token and token not in _PUNCTUATION:
                yield token
        else:  # a space, or a character that is dropped
            position += 1
