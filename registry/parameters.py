"""What may stand behind the ? of a database's address: which parameters, and which values of each.

Whatever stands there goes on to the driver and the libraries below it, and of their parameters nobody has counted
those that name what is imported, loaded or written. A value that the driver cannot take is found before anything is
measured, and not by the first run that is logged.
"""

from __future__ import annotations

import ipaddress
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from registry.outcome import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    Rule = Callable[[str], str]
    """Why a value is none, empty if it is one."""

BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")
LARGEST = 2**31 - 1
LONGEST_S = 31_536_000
"""Seconds that PyMySQL waits at most: a year."""
INSTALLED = re.compile(r"[\w .()-]+")
"""An ODBC driver by the name under which it is installed, and no library's file."""
METHODS = ("gss", "md5", "none", "oauth", "scram-sha-256", "sspi", "password")
"""By which a PostgreSQL server may ask who is there."""


def _text(value: str) -> str:
    return "" if value.strip() else "is empty"


def _whole(least: int, most: int = LARGEST) -> Rule:
    def problem(value: str) -> str:
        found = int(value) if re.fullmatch(r"-?[0-9]{1,12}", value) else None
        return "" if found is not None and least <= found <= most else f"is a whole number of {least} to {most}"

    return problem


def _choice(*known: str) -> Rule:
    return lambda value: "" if value in known else f"has no such value: {nearest(value, known)}"


def _any_case(*known: str) -> Rule:
    lower = [one.lower() for one in known]
    return lambda value: "" if value.lower() in lower else f"has no such value: {nearest(value, known)}"


def _each(rule: Rule) -> Rule:
    """Of a list with commas, as libpq takes for several hosts; a part that is empty is what libpq takes by itself."""

    def problem(value: str) -> str:
        return next(filter(None, (rule(part) for part in value.split(",") if part)), "") if value else _text(value)

    return problem


def _seconds(value: str) -> str:
    try:
        return "" if 0 <= float(value) < math.inf else "is a number of seconds"
    except ValueError:
        return "is a number of seconds"


def _address(value: str) -> str:
    try:
        ipaddress.ip_address(value.partition("%")[0])
    except ValueError:
        return "is an IP address"
    return ""


def _file(value: str) -> str:
    """A file by its whole path. To libpq an `sslkey` with a colon is a key of an OpenSSL engine, which is loaded."""
    try:
        if value.startswith("/") and ":" not in value and Path(value).is_file():
            return ""
    except (OSError, ValueError):
        pass
    return "names no file that is there by its whole path, without a colon"


def _installed(value: str) -> str:
    return "" if INSTALLED.fullmatch(value) else "is the name under which an ODBC driver is installed"


BOOLEAN = _any_case(*BOOLEANS)
PARAMETERS: dict[str, dict[str, Rule]] = {
    "sqlite": {"timeout": _seconds},
    "postgresql": {
        "connect_timeout": _whole(0),
        **dict.fromkeys(("application_name", "client_encoding", "host", "user", "password"), _text),
        "hostaddr": _each(_address),
        "port": _each(_whole(1, 65535)),
        "sslmode": _choice("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
        "sslnegotiation": _choice("postgres", "direct"),
        **dict.fromkeys(("sslrootcert", "sslcert", "sslkey"), _file),
        "ssl_min_protocol_version": _any_case("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
        "channel_binding": _choice("disable", "prefer", "require"),
        "gssencmode": _choice("disable", "prefer", "require"),
        "require_auth": _each(_choice(*METHODS, *(f"!{one}" for one in METHODS))),
        "target_session_attrs": _choice("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
        "load_balance_hosts": _choice("disable", "random"),
        "keepalives": _whole(0, 1),
        **dict.fromkeys(
            ("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"), _whole(0)
        ),
    },
    "mysql": {
        **dict.fromkeys(("charset", "collation", "unix_socket"), _text),
        "use_unicode": BOOLEAN,
        **dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), _whole(1, LONGEST_S)),
        **dict.fromkeys(("ssl_ca", "ssl_cert", "ssl_key"), _file),
        **dict.fromkeys(("ssl_check_hostname", "ssl_verify_cert", "ssl_verify_identity"), BOOLEAN),
    },
    "mssql": {
        "driver": _installed,
        "encrypt": _any_case(*BOOLEANS, "mandatory", "optional", "strict"),
        **dict.fromkeys(("hostnameincertificate", "app"), _text),
        **dict.fromkeys(("trustservercertificate", "trusted_connection", "multisubnetfailover"), BOOLEAN),
        **dict.fromkeys(("mars_connection", "autocommit"), BOOLEAN),
        "applicationintent": _any_case("ReadOnly", "ReadWrite"),
        **dict.fromkeys(("timeout", "logintimeout"), _whole(0)),
    },
}
"""Databases -> what may stand behind the ? of their addresses, and what it may be."""
SEVERAL = ("host",)
"""What SQLAlchemy takes more than once, for several hosts; of anything else it would make a list, which no driver
takes."""


def problem(behind: str, scheme: str) -> str:
    """Why what stands behind the ? of a database's address is not passed on; empty if all of it is.

    Args:
        behind: That part of the address.
        scheme: The database's, a key of `PARAMETERS`.
    """
    seen: set[str] = set()
    for one in filter(None, re.split("[?&;]", behind)):
        name, _, value = map(unquote_plus, one.partition("="))
        key = name.lower()
        if key not in PARAMETERS[scheme]:
            return f"{name}= is not passed on to a database's driver; taken are {', '.join(PARAMETERS[scheme])}"
        if key in seen and key not in SEVERAL:
            return f"{name}= stands there twice"
        if why := PARAMETERS[scheme][key](value):
            return f"{name}= {why}"
        seen.add(key)
    return ""
