"""Where the members of a tar file lie: one walk over its headers, then each member is one read at an offset.

Here is only what `shards.py` needs of the tar format: plain files under short names, as webdataset writes
them. Why there is an index of our own is in docs/decisions/0004-shard-index.md.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_END = bytes(BLOCK)
_PLAIN_FILE = (b"0", b"\0")


class Member(NamedTuple):
    """A file in a tar: its content is `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """Walk over the members of a tar, or of some that follow one another.

    Args:
        read: Called with (bytes, offset), gives them.
        size: Bytes in all.

    Yields:
        The members in their order.

    Raises:
        ValueError: What is read is not a header of a plain file, or a member ends behind the end of the file.
    """
    position = 0
    while position + BLOCK <= size:
        header = read(BLOCK, position)
        if header == _END:
            return
        if header[257:262] != b"ustar" or header[156:157] not in _PLAIN_FILE:
            raise ValueError(f"no header of a plain file at byte {position}")
        name = _text(header[:100])
        if header[345:346] != b"\0":
            name = f"{_text(header[345:500])}/{name}"
        length = int(header[124:136].strip(b" \0"), 8)
        if position + BLOCK + length > size:
            raise ValueError(f"{name} ends behind the end of the file")
        yield Member(name, position + BLOCK, length)
        position += BLOCK + -(-length // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()
