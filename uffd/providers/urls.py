"""URLs as fsspec takes them: which strings are some, and how they may be shown."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(name: str) -> bool:
    """Whether fsspec is to open it: https://..., or a chain such as simplecache::s3://..."""
    return _URL.match(name) is not None


def shown(url: str) -> str:
    """The URL as it may be printed: without a password, and without a query, which may be a signature."""
    if "::" in url or "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:                  # no host is to be had of it
        return after_password(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def after_password(url: str) -> str:
    """The same of one whose parts are where they should not be, a password's signs among them."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
