"""Damage: bytes as a bad line, or somebody bad, leaves them."""

import random


def damaged(seed: int, data: bytes) -> bytes:
    """The bytes, damaged: bits turned, a part cut out, doubled or made up, or the end missing."""
    draw = random.Random(seed)
    mutant = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        # Half of the time at an end of it: in the middle of a large message are numbers, and any bits are numbers.
        at = draw.choice(
            [draw.randrange(len(mutant) or 1), draw.randrange(200), max(len(mutant) - draw.randrange(200), 0)]
        )
        until = at + draw.choice([1, 1, 4, 50])
        kind = draw.randrange(5)
        if kind == 0 and mutant:
            mutant[at % len(mutant)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del mutant[at:until]
        elif kind == 2:
            mutant[at:at] = mutant[at:until]
        elif kind == 3:
            mutant[at:until] = draw.randbytes(until - at)
        else:
            del mutant[at:]
    return bytes(mutant)
