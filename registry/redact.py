"""Secrets, and text without them: the one place that knows what must not be told.

A secret is known by its value (what this process's environment or a cell's configuration keeps under a secret's
name, but for `OWN_WORDS` and what is shorter than `SHORTEST`), by the name before it, by its shape, or by its place
in an address. What rfloor writes or prints passes through here at the border: records, logs, artifacts, what MLflow
gets, messages. A name's prefix is free (`HF_TOKEN`, `backend.options.api_key`); the tokens that a model counts and
the keys that it attends to are no secrets.

The patterns work on bytes, so that a log that is no text can be cleaned too, and each takes linear time.
"""

from __future__ import annotations

import base64
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

HIDDEN = "***"
MARK = HIDDEN.encode()
SHORTEST, SHORTEST_NUMBER = 4, 5
"""Characters of the shortest value that is looked for in text, and of the shortest of digits alone: a context length
or a year says nothing of a secret, and stands everywhere by chance."""
ALONE, WORD_ALONE = 10, 12
"""Characters below which a value, and one of letters alone or digits alone, is only found where it stands alone, and
no part of a longer word."""
OWN_WORDS = {
    *("random", "none", "null", "true", "false", "auto", "test", "default", "password", "secret", "token", "rfloor"),
    *("step", "attention", "eager", "cuda", "sdpa", "dynamic", "static", "quick", "paper", "local", "server", "tiny"),
    *("basic", "bearer", "digest", "oauth", "oauth2", "ldap", "kerberos", "enabled", "disabled"),
    *("crash", "timeout", "interrupted", "incorrect", "unsupported", "cuda_graph", "compile"),
}
"""Values that are looked for nowhere: rfloor writes them into every record, which would be of no use without them and
tells nobody by them that they are a secret too; or they are what a variable says of a way to log in."""
FIELD = re.compile(r"[A-Za-z][a-z0-9_]{0,23}")
"""A key that programs look a value up by (`step_times_ms`): no value is looked for in it."""

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
ALWAYS = re.compile(r".*(?:password|passwd|passphrase|passcode|secret|credential|apikey)s?|authorization")
"""Words that make a name a secret's wherever they stand in it, also at the end of a longer one (`sslpassword`)."""
ENDING = re.compile(r"(.*?)(key|token|pass|pwd|auth|\b(?:pat|pw|jwt|cookie))(s?)")
"""Last words of names that may be a secret's, which what stands before them decides, as part of the word or not; of
the shorter ones, with which other words end, only as a word of its own."""
OWNERS = {
    *("api", "access", "account", "auth", "hf", "hub", "huggingface", "kaggle", "wandb", "openai", "anthropic"),
    *("cohere", "azure", "aws", "google", "ngc", "nvidia", "github", "gitlab", "stripe", "datadog"),
}
USERS = {"db", "database", "user", "login", "admin", "root", "my", "ssh", "smtp", "mail", "ftp", "http", "proxy"}
USERS |= {"redis", "mysql", "pg", "postgres", "mongo", "npm", "docker"}
BEFORE = {
    "key": OWNERS | {"private", "secret", "signing", "encryption", "master", "ssh", "fernet"},
    "token": OWNERS | {"secret", "bearer", "refresh", "session"},
    "pass": USERS,
    "pwd": USERS,
    "auth": USERS,
    "pat": OWNERS | {"devops", "ext", "git", "gh"},
    "pw": USERS,
    "jwt": OWNERS | USERS,
    "cookie": {"session", "auth", "login", "csrf", "access"},
}
"""What makes such a name a secret's however it is written; in capitals, as a variable's, almost anything does."""
SWITCHES = {"require", "no", "use", "with", "without", "enable", "disable", "skip", "needs"}
NOT_BEFORE = {
    "key": {
        *("public", "pub", "cache", "sort", "primary", "foreign", "partition", "group", "row", "column", "index"),
        *("object", "map", "dict", "lookup", "num", "max", "any", "no", "of", "first", "last", "next", "each", "per"),
        *("open", "hot", "mon", "tur", "don", "hoc", "whis", "joc"),
    },
    "token": {
        *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "per", "next", "last", "first", "new", "prev"),
        "previous",
        *("special", "start", "end", "stop", "image", "audio", "video", "input", "output", "each", "one", "a", "the"),
        *("max", "min", "num", "total", "prompt", "completion", "generated", "batched", "cached", "context", "embed"),
    },
    "pass": {
        *("a", "per", "each", "one", "first", "second", "last", "next", "forward", "backward", "num", "max"),
        "single",
        *("com", "by", "sur", "tres", "over", "under", "encom"),
    },
    "pwd": {"old"},
    "auth": SWITCHES,
    "pat": SWITCHES,
    "pw": SWITCHES,
    "jwt": SWITCHES,
    "cookie": SWITCHES,
}
"""What makes such a name a program's or a model's: the tokens that it counts, the keys that it looks up."""
ABOUT = {"file", "path", "dir", "folder", "name", "id", "length", "len", "count", "type", "policy", "url", "uri"}
"""Last words of names that tell about a secret and do not hold it."""
NOTHING = {b"none", b"null", b"true", b"false", b"...", MARK, b""}

HINT = re.compile(rb"(?i:pass|pwd|secret|credential|key|token|auth|jwt|cookie|(?:pat|pw)s?(?![a-z]))")
"""Every secret's name has one of these in it."""
SHAPES = (
    rb"-----BEGIN[A-Z\s]{0,60}PRIVATE\s{1,40}KEY[A-Z\s]{0,20}-----"  # folded, where YAML was written
    rb"(?:(?!-----)[\s\S]){0,20000}+(?:-----END[A-Z\s]{0,60}-----)?",
    rb"hf_(?<![A-Za-z0-9]hf_)[A-Za-z0-9]{20,}+",
    rb"sk-(?<![\w-]sk-)(?=[A-Za-z_-]{0,40}[0-9])[\w-]{20,}+",
    rb"sk-(?<![\w-]sk-)(?:proj-|svcacct-|admin-)?(?:(?=[A-Z]*+[a-z]++[A-Z])[A-Za-z]{20,}+|[A-Za-z]{32,}+)",
    rb"[sr]k_(?:live|test)_[A-Za-z0-9]{12,}+",
    rb"gh[pousr]_[A-Za-z0-9]{30,}+",
    rb"github_pat_\w{22,}+",
    rb"glpat-[\w-]{16,}+",
    rb"A[KS]IA(?<![A-Za-z0-9]A[KS]IA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    rb"AIza(?<![A-Za-z0-9]AIza)[\w-]{35}",
    rb"ya29\.(?<![A-Za-z0-9]ya29\.)[\w-]{20,}+",
    rb"SG\.(?<![A-Za-z0-9]SG\.)[\w-]{16,}+\.[\w-]{16,}+",
    rb"glsa_[A-Za-z0-9]{20,}+(?:_[0-9A-Fa-f]{8})?",
    rb"(?:https?://)?hooks\.slack\.com/(?:services|workflows|triggers)/[TE]\w{6,}+/\w{6,}+(?:/\w{16,}+){1,2}",
    rb"xox[a-z]-[\w-]{10,}+",
    rb"npm_[A-Za-z0-9]{36}",
    rb"pypi-AgE[\w-]{16,}+",
    rb"nvapi-(?<![A-Za-z0-9]nvapi-)[\w-]{20,}+",
    rb"gsk_(?<![A-Za-z0-9]gsk_)[A-Za-z0-9]{20,}+",
    rb"xai-(?<![\w-]xai-)[A-Za-z0-9]{20,}+",
    rb"r8_(?<!\wr8_)(?=[A-Za-z]{0,40}[0-9])[A-Za-z0-9]{20,}+",
    rb"AT[AC]TT(?<![A-Za-z0-9]AT[AC]TT)[\w=-]{20,}+",
    rb"(?:https?://)?(?:canary\.|ptb\.)?discord(?:app)?\.com/api/(?:v[0-9]{1,3}/)?webhooks/[0-9]{6,}+/[\w-]{16,}+",
    rb"(?<![0-9])[0-9]{8,10}:AA[\w-]{30,}+",
    rb"dapi(?<![A-Za-z0-9]dapi)[0-9a-f]{32}",
    rb"[Bb][Ee][Aa][Rr][Ee][Rr] (?<![A-Za-z0-9]bearer )[\w.~+/=-]{16,}+",
)
SHAPE = re.compile(b"|".join(b"(?:%b)" % shape for shape in SHAPES))
WEB_TOKEN = re.compile(rb"eyJ[\w.-]++")
BASIC = re.compile(rb"((?<![A-Za-z0-9])[Bb][Aa][Ss][Ii][Cc][ \t]{1,8})([A-Za-z0-9+/_-]{4,}+={0,2})")
USER_OPTION = re.compile(
    rb"((?<![\w-])(?:-u|--(?:proxy-)?user)[\"']?(?:,[ \t]?|[ \t=])[\"']?(?![0-9]+:[0-9])[^\s:\"'/]{1,64}+:)"
    rb"([^\s\"'/][^\s\"']*+)"
)
CONNECTION = re.compile(rb"(?<![\w.-])((?i:pwd)[ ]?=[ ]?)(\{[^{}\r\n]*+\}|[^\s;\"'&$~/.][^\s;\"'&]*+)(;?)")
ADDRESS = re.compile(rb"://(?<=[A-Za-z0-9]://)(?!/)\S*+")
PARAMETER = re.compile(rb"([?&])([\w.%-]{1,60}+)=([^&\s\"'<>]++)")
HEADER = re.compile(
    rb"((?i:authorization)[\"']?[ \t]{0,8}[:=][ \t]{0,8}[bru]{0,2}[\"']?)"
    rb"((?i:(?:bearer|basic|digest|token|negotiate|apikey)[ \t]++)?[^\s\"',;]++)"
)
VARIABLE = re.compile(rb"^((?:export |set )?)([A-Z][A-Z0-9_]*+)=([^\r\n]++)", re.MULTILINE)
NAMED = re.compile(rb"(?<![\w.-])((?:--)?[\w.-]++)([\"']?[ \t]{0,8}[:=][ \t]{0,8}|[\"'],[ \t]{0,8}(?=[\"'bru])|[ ])")
QUOTED = re.compile(rb"([bru]{0,2}([\"']))((?:\\[\s\S]|(?!\2)[^\\])*+)\2")
SPOKEN = re.compile(r"(?i)(?:tokens?|keys|secrets|passwords|pass|pwd|auth|pats?|pw|jwts?|cookies?)$")
"""Ends of names that code and prose use of other things, or of secrets in general, too."""
BARE = re.compile(rb"\$\{[^\s{}]*+\}|[^\s\"',;&()\[\]{}<>]++")

BLOCK = re.compile(rb"[|>][0-9+-]{0,2}[ \t]{0,8}(?:#[^\r\n]*+)?\r?\n")
"""How a value of YAML begins that is made of the lines below it, as long as they are indented further."""

STANDS_ALONE = rb"(?:(?<![A-Za-z0-9])|(?<=%%[0-9A-Fa-f]{2})|(?<=\\[nrt]))%b(?![A-Za-z0-9])"
"""No part of a longer word; an escape before it, as `%%40` and `\\n`, is none."""


def redact(text: str) -> str:
    """`text` without this process's secrets and without what looks like one."""
    return Redactor(environment_secrets(os.environ)).text(text)


class Redactor:
    """Hides secrets.

    Args:
        known: Secrets that are to be found by their value, however they are spelt.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = _values(frozenset(known))

    def text(self, text: str) -> str:
        """`text` with `***` where secrets stood."""
        return self.data(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")

    def data(self, data: bytes) -> bytes:
        """The same of bytes in whatever encoding that begins with ASCII."""
        if self._known:
            data = self._known.sub(MARK, data)
        data = SHAPE.sub(MARK, data)
        data = WEB_TOKEN.sub(_web_token, data)
        data = BASIC.sub(_basic, data)
        data = USER_OPTION.sub(_behind, data)
        data = ADDRESS.sub(_address, data)
        data = PARAMETER.sub(_parameter, data)
        if not HINT.search(data):  # which spares most logs the dearest pattern
            return data
        data = HEADER.sub(rb"\1" + MARK, data)
        data = VARIABLE.sub(_variable, data)
        data = CONNECTION.sub(_connection, data)
        return _without_named(data)

    def plain(self, value: Any) -> Any:
        """A JSON-like value with `***` for what stands under a secret's name, and in its texts."""
        if isinstance(value, dict):
            return {
                self._key(k): HIDDEN if secret_name(str(k)) and _is_something(v) else self.plain(v)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self.plain(inner) for inner in value)
        return self.text(value) if type(value) is str else value  # no enumeration's

    def _key(self, key: Any) -> Any:
        return key if FIELD.fullmatch(str(key)) else self.plain(key)


def secret_name(name: str) -> bool:
    """Whether what is called so is a secret: `HF_TOKEN`, `api_key`, `backend.options.password`, `DBPASSWORD`."""
    name = name.rpartition(".")[2]
    words = [word.lower() for word in WORD.findall(name)]
    while words and words[-1].isdigit() and name.isupper():  # API_KEY_2
        words.pop()
    if not words or words[-1] in ABOUT:
        return False
    if name.isupper() and words[0] == "token" and words[1:] and OWNERS.issuperset(words[1:]):  # TOKEN_HF
        return True
    return any(map(ALWAYS.fullmatch, words)) or _ends_as_secret(words, name.isupper())


def _ends_as_secret(words: list[str], variable: bool) -> bool:
    """Whether a name's last words are a secret's.

    Args:
        words: The name's.
        variable: It is written as variables of an environment are.
    """
    ending = ENDING.fullmatch(words[-1])
    if not ending:
        return False
    joined, kind, plural = ending.groups()
    before = joined or "".join(words[-2:-1])
    if before in BEFORE[kind] or before in NOT_BEFORE[kind]:
        return before in BEFORE[kind]
    if kind in ("token", "auth", "jwt") and not joined and not plural:
        return True
    if kind == "pwd" and not before:
        return not variable  # a shell's PWD is a folder
    return bool(before) and variable


def _secret_variable(name: str) -> bool:
    """Whether a variable of the environment is a secret's, whose value is then looked for: also a mere `KEY`."""
    name = name.upper()
    return secret_name(name) or name in ("KEY", "KEYS", "TOKENS", "PASS")


def environment_secrets(environment: Mapping[str, str]) -> set[str]:
    """The values of an environment's secrets, and the passwords of the addresses in it."""
    found = {value for name, value in environment.items() if _secret_variable(name) and not _there(value)}
    return found.union(*(_passwords(value) for value in environment.values() if "://" in value))


def known_secrets(plain: Any) -> set[str]:
    """The secrets in a JSON-like value: what stands under a secret's name, and the passwords of addresses."""
    if isinstance(plain, dict):
        own = ({*map(str, _leaves(v))} if secret_name(str(k)) else known_secrets(v) for k, v in plain.items())
        return set().union(*own)
    if isinstance(plain, list | tuple):
        return set().union(*map(known_secrets, plain))
    return _passwords(plain) if isinstance(plain, str) and "://" in plain else set()


def _is_something(value: Any) -> bool:
    return value is not None and value != "" and not isinstance(value, bool)


def _leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if inner is not None:
        for one in inner:
            yield from _leaves(one)
    elif _is_something(value):
        yield value


def _there(value: str) -> bool:
    """Whether a value names a file: credentials often do. A bare word is a password whatever lies in this folder."""
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):
        return False


def _passwords(text: str) -> set[str]:
    """What is secret in the addresses of a text."""
    data = text.encode(errors="surrogatepass")
    users = (match[0][3:].rpartition(b"@")[0] for match in ADDRESS.finditer(data))
    found = [user.partition(b":")[2] or user for user in users if user]
    found += [match[3] for match in PARAMETER.finditer(data) if _secret_parameter(match[2].decode())]
    return {spelt for one in found for spelt in (one.decode(errors="replace"), unquote(one.decode(errors="replace")))}


@lru_cache(maxsize=64)
def _values(known: frozenset[str]) -> re.Pattern[bytes] | None:
    """A pattern of every spelling of the values that can be looked for."""
    alone: dict[bytes, bool] = {}
    for value in known:
        if len(value) < (SHORTEST_NUMBER if value.isdigit() else SHORTEST) or value.lower() in OWN_WORDS:
            continue
        spelt = {value, quote(value, safe="/"), quote(value, safe=""), quote_plus(value), repr(value)[1:-1]}
        spelt |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
        for one in spelt:
            short = len(one) < (WORD_ALONE if one.isalpha() or one.isdigit() else ALONE)
            alone[one.encode(errors="surrogatepass")] = short
    if not alone:
        return None
    longest_first = sorted(alone, key=len, reverse=True)
    forms = (STANDS_ALONE % re.escape(one) if alone[one] else re.escape(one) for one in longest_first)
    return re.compile(b"|".join(forms))


def _address(match: re.Match[bytes]) -> bytes:
    """Without what stands before the last @ of an address, whether or not its slashes are escaped."""
    before, at, host = match[0].rpartition(b"@")
    return b"://" + MARK + at + host if len(before) > len(b"://") else match[0]


def _web_token(match: re.Match[bytes]) -> bytes:
    """Header, payload and signature; the full stop of a sentence may follow."""
    parts = match[0].rstrip(b".").split(b".")
    signed = len(parts) > 2 and len(parts[0]) > 10 and len(parts[1]) > 7
    return MARK + match[0][len(match[0].rstrip(b".")) :] if signed else match[0]


def _basic(match: re.Match[bytes]) -> bytes:
    """Without what decodes to a user and a password; `basic building` does not."""
    data = match[2].translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        text = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True).decode()
    except ValueError:
        return match[0]
    return match[1] + MARK if ":" in text and text.isprintable() else match[0]


def _behind(match: re.Match[bytes]) -> bytes:
    return match[0] if _is_nothing(match[2]) else match[1] + MARK


def _connection(match: re.Match[bytes]) -> bytes:
    """Without the password of a connection string, whose parts end with semicolons; a shell's PWD is a folder."""
    before = match.string[max(0, match.start() - 2) : match.start()].rstrip(b" ")
    return (
        match[1] + MARK + match[3] if (match[3] or before.endswith(b";")) and not _is_nothing(match[2]) else match[0]
    )


def _secret_parameter(name: str) -> bool:
    words = [word.lower() for word in WORD.findall(name)]
    return secret_name(name) or words in (["key"], ["pwd"], ["pass"]) or words[-1:] in (["sig"], ["signature"])


def _parameter(match: re.Match[bytes]) -> bytes:
    if not _secret_parameter(match[2].decode(errors="replace")):
        return match[0]
    return match[1] + match[2] + b"=" + MARK


def _variable(match: re.Match[bytes]) -> bytes:
    """A line of an environment: the value ends where the line does."""
    if not secret_name(match[2].decode()) or _is_nothing(match[3]):
        return match[0]
    return match[1] + match[2] + b"=" + MARK


def _without_named(data: bytes) -> bytes:
    """Without what stands behind a secret's name."""
    kept, done = [], 0
    for match in NAMED.finditer(data):
        if match.start() >= done and secret_name(match[1].decode(errors="replace")):
            start, end = _value(match, data)
            kept += [data[done:start], MARK] if end else []
            done = end or done
    return b"".join([*kept, data[done:]])


def _value(match: re.Match[bytes], data: bytes) -> tuple[int, int]:
    """Where the value behind a secret's name begins and ends; both 0 where there is none to hide."""
    name, between = match[1], match[2]
    if between == b" " and not name.startswith(b"--"):
        return 0, 0
    if end := _block_end(match, data):
        return match.end(), end
    if quoted := QUOTED.match(data, match.end()):
        return (0, 0) if _is_nothing(quoted[3]) else quoted.span(3)
    bare = BARE.match(data, match.end())
    if bare is None or _is_nothing(bare[0]):
        return 0, 0
    typed = name.startswith(b"--") or name.isupper() or (b"." in name and between == b"=")  # and not of a program
    return bare.span() if typed or _credential(name.decode(errors="replace"), bare[0]) else (0, 0)


def _block_end(match: re.Match[bytes], data: bytes) -> int:
    """Where a value of YAML ends that is made of the lines below its name; 0 where it is no such value."""
    begin = BLOCK.match(data, match.end()) if b":" in match[2] else None
    if begin is None:
        return 0
    before = data[data.rfind(b"\n", 0, match.start()) + 1 : match.start()].rstrip(b"\"'")
    # A name that has other words before it in its line is a log's, whose lines below it are indented as they are.
    indent = len(before) if not before.strip(b" -") else len(before) - len(before.lstrip(b" "))
    lines = re.compile(rb"(?:[ \t]*+\r?\n|[ ]{%d,}+[^\n]*+(?:\n|\Z))*+" % (indent + 1)).match(data, begin.end())
    value = lines[0].rstrip() if lines else b""
    return begin.end() + len(value) if value.strip() else 0


def _credential(name: str, value: bytes) -> bool:
    """Whether a bare value after a plain name is one: code and prose say `token = ...` too."""
    if not SPOKEN.search(name):
        return True
    return bool(re.fullmatch(rb"[\w.~+/=-]{8,}", value) and re.search(rb"\d", value))


def _is_nothing(value: bytes) -> bool:
    return (
        value.lower() in NOTHING
        or value.startswith(b"${")
        or (value.startswith((b"/", b"~")) and _there(value.decode(errors="replace")))
    )
