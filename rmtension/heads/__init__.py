"""Heads: what turns the residual stream after the final norm into rewards, and how published heads are read."""

from rmtension.heads._head import Head, LinearHead
from rmtension.heads._log_ratio_head import LogRatioHead
from rmtension.heads._process_head import ProcessHead

__all__ = ["Head", "LinearHead", "LogRatioHead", "ProcessHead"]
