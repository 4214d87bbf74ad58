"""Attention over reported keys: weights, policies, certificates; decode, prefill and sessions.

Letters as in `hsr`; ``B`` is the batch, ``dv`` the width of a value.  ``s_j = scale <q, k_j>``.
"""

from attention.decode import decode
from attention.policies import Certified, Dense, Policy, TopR
from attention.prefill import prefill
from attention.result import Certificate, Counters, Result
from attention.sampled import Sampled
from attention.session import DecodeSession
from attention.values import Values
from attention.weights import ReLUPower, Softmax

__all__ = [
    "Certificate",
    "Certified",
    "Counters",
    "DecodeSession",
    "Dense",
    "Policy",
    "ReLUPower",
    "Result",
    "Sampled",
    "Softmax",
    "TopR",
    "Values",
    "decode",
    "prefill",
]
