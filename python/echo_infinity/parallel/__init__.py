"""One stream on several processes: tokens are shared out for linear layers, heads for self-attention and its cache.

Attention over heads needs no more than an exchange before and after it, whatever it reads: sink, memory and ring stay
where they are, a part of the heads on each process, and no key travels twice. A cache shared out by frames or tokens
would pass all of it around in every call.
"""

from echo_infinity.parallel.lead import ProcessesError, lead
from echo_infinity.ranks import Ranks, join_ranks, leave_ranks

__all__ = ["ProcessesError", "Ranks", "join_ranks", "lead", "leave_ranks"]
