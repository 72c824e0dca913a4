"""Where the members of a tar file lie: one walk over its headers, then each member is one read at an offset.

Here is only what `shards.py` needs of the tar format: plain files under short names, as webdataset writes
them. Why there is an index of our own is in docs/decisions/0004-shard-index.md.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 512
_END = bytes(_BLOCK)
_PLAIN_FILE = (b"0", b"\0")


class Member(NamedTuple):
    """A file in a tar: its content is `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


def members(file: int, size: int) -> Iterator[Member]:
    """Walk over the members of an open tar.

    Args:
        file: Its descriptor.
        size: Its size in bytes.

    Yields:
        The members in their order.

    Raises:
        ValueError: What is read is not a header of a plain file, or a member ends behind the end of the file.
    """
    position = 0
    while position + _BLOCK <= size:
        header = os.pread(file, _BLOCK, position)
        if header == _END:
            return
        if header[257:262] != b"ustar" or header[156:157] not in _PLAIN_FILE:
            raise ValueError(f"no header of a plain file at byte {position}")
        name = _text(header[:100])
        if header[345:346] != b"\0":
            name = f"{_text(header[345:500])}/{name}"
        length = int(header[124:136].strip(b" \0"), 8)
        if position + _BLOCK + length > size:
            raise ValueError(f"{name} ends behind the end of the file")
        yield Member(name, position + _BLOCK, length)
        position += _BLOCK + -(-length // _BLOCK) * _BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()
