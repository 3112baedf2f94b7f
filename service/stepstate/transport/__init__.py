"""The gRPC front doors."""

from stepstate.transport.interceptor import RpcInterceptor
from stepstate.transport.reflection import add_reflection
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.transport.servicer import StepstateServicer

__all__ = ["ReplyBudget", "RpcInterceptor", "StepstateServicer", "add_reflection"]
