"""One word for all that the choice of launches depends on beside a call and its GPU."""

from __future__ import annotations

import hashlib


def db_digest() -> str:
    """Twelve hexadecimal digits of the tuning databases in force.

    They are the one of the package and the one that goes before it: that of `options`, else the one that
    `dilated-attention tune` writes for an installed package. One without entries counts as none.

    Ranks that agree on it, on equal devices, launch the same kernels with the same configurations. Without a database
    in `options` it is what `dilated-attention db digest` prints.

    Raises:
        DatabaseError: A file lies where no lookup would find it.
    """
    from .. import database
    from .options import current
    from .plan import overlay_of

    digest, mine = database.load().digest(), overlay_of(current())
    if mine is None or not mine.files():
        return digest
    return hashlib.sha256(f"{digest} {mine.digest()}".encode()).hexdigest()[:12]
