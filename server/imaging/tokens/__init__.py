"""How many tokens a picture costs, and how to keep it within a cap; pure arithmetic.

One small module a family behind one protocol, `TokenRule`. The engine chooses the rule of a model
by its processor's configuration (`server.engine.token_rules`).
"""

from server.imaging.tokens.budget import Claim, kv_bytes_per_token, plan_together, share
from server.imaging.tokens.measured import Count, MeasuredTokens
from server.imaging.tokens.plan import Detail, ImagePlan, TokenRule, detail_cap

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
