"""How many tokens a picture costs, and how to keep it within a cap; pure arithmetic.

Each family of models has a rule behind one protocol, `TokenRule`. The engine chooses a model's rule
by its processor's configuration (`server.engine.token_rules`).
"""

from server.imaging.tokens.measured import Count, MeasuredTokens
from server.imaging.tokens.plan import (
    Claim,
    Detail,
    ImagePlan,
    TokenRule,
    detail_cap,
    kv_bytes_per_token,
    plan_together,
    share,
)

__all__ = [
    "Claim",
    "Count",
    "Detail",
    "ImagePlan",
    "MeasuredTokens",
    "TokenRule",
    "detail_cap",
    "kv_bytes_per_token",
    "plan_together",
    "share",
]
