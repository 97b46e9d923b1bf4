"""The number of tokens that a picture costs, and how to meet a cap; pure arithmetic.

Each family of models has a rule with the protocol `TokenRule`. `server.engine.token_rules` chooses
the rule by the configuration of the model's processor.
"""

from server.imaging.tokens.budget import Claim, allocate_together, kv_bytes_per_token, share
from server.imaging.tokens.rule import (
    Count,
    Detail,
    MeasuredTokens,
    TokenAllocation,
    TokenRule,
    View,
    detail_cap,
)

__all__ = [
    "Claim",
    "Count",
    "Detail",
    "MeasuredTokens",
    "TokenAllocation",
    "TokenRule",
    "View",
    "allocate_together",
    "detail_cap",
    "kv_bytes_per_token",
    "share",
]
