"""Attention over reported keys: weights, policies, certificates; decode, prefill and sessions.

Letters as in `hsr`; ``B`` is the batch, ``dv`` the width of a value.  ``s_j = scale <q, k_j>``.
"""

from attention.audit import Audit, audit
from attention.audit_bounds import Estimate
from attention.audit_rows import Kept
from attention.block_sampled import BlockSampled
from attention.decode import decode
from attention.key_lists import KeyLists
from attention.listed import Listed
from attention.policies import Certified, Dense, Policy, TopR
from attention.prefill import prefill
from attention.result import Certificate, Counters, Result
from attention.sampled import Sampled
from attention.session import DecodeSession
from attention.shared_prompt import BlockResult
from attention.skip_softmax import SkipResult, SkipSoftmax
from attention.values import Values
from attention.weights import ReLUPower, Softmax

__all__ = [
    "Audit",
    "BlockResult",
    "BlockSampled",
    "Certificate",
    "Certified",
    "Counters",
    "DecodeSession",
    "Dense",
    "Estimate",
    "Kept",
    "KeyLists",
    "Listed",
    "Policy",
    "ReLUPower",
    "Result",
    "Sampled",
    "SkipResult",
    "SkipSoftmax",
    "Softmax",
    "TopR",
    "Values",
    "audit",
    "decode",
    "prefill",
]
