"""Low-precision attention for PyTorch models, on the best backend that the hardware has.

::

    import lpattn
    model = lpattn.apply_low_precision_attention(model)
"""

from lpattn.backend import Backend, Capabilities
from lpattn.dispatch import Explanation
from lpattn.eager.apply import apply_low_precision_attention, remove_low_precision_attention
from lpattn.eager.context import low_precision_attention
from lpattn.eager.report import AttentionReport, LayerReport, attention_report
from lpattn.errors import (
    BackendError,
    BackendUnavailableError,
    InvalidArgumentError,
    LpattnError,
    LpattnWarning,
    RegistrationError,
    UnknownBackendError,
    UnsupportedCallError,
)
from lpattn.functional import explain, low_precision_rope_sdpa, low_precision_sdpa, low_precision_varlen_sdpa
from lpattn.hookspecs import hookimpl
from lpattn.inventory import BackendInfo, available_backends, register_backend, unregister_backend
from lpattn.policy import exact_ends
from lpattn.types import (
    AttentionBackend,
    AttentionCall,
    CausalKind,
    Choice,
    HadamardMode,
    MaskKind,
    Norm,
    Provenance,
    Reason,
    Rope,
    Varlen,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "AttentionReport",
    "Backend",
    "BackendError",
    "BackendInfo",
    "BackendUnavailableError",
    "Capabilities",
    "CausalKind",
    "Choice",
    "Explanation",
    "HadamardMode",
    "InvalidArgumentError",
    "LayerReport",
    "LpattnError",
    "LpattnWarning",
    "MaskKind",
    "Norm",
    "Provenance",
    "Reason",
    "RegistrationError",
    "Rope",
    "UnknownBackendError",
    "UnsupportedCallError",
    "Varlen",
    "apply_low_precision_attention",
    "attention_report",
    "available_backends",
    "exact_ends",
    "explain",
    "hookimpl",
    "low_precision_attention",
    "low_precision_rope_sdpa",
    "low_precision_sdpa",
    "low_precision_varlen_sdpa",
    "register_backend",
    "remove_low_precision_attention",
    "unregister_backend",
]
