"""One word for all that the choice of launches depends on beside a call and its GPU."""

from __future__ import annotations

import hashlib


def db_digest() -> str:
    """Twelve hexadecimal digits of the tuning databases in force: the one of the package, and that of `options`.

    Ranks that agree on it, on equal devices, launch the same kernels with the same configurations. Without a database
    of one's own it is what `dilated-attention db digest` prints.

    Raises:
        DatabaseError: A file lies where no lookup would find it.
    """
    from .. import database
    from .options import current

    digest = database.load().digest()
    mine = current().database
    if mine is None:
        return digest
    return hashlib.sha256(f"{digest} {database.load(mine).digest()}".encode()).hexdigest()[:12]
