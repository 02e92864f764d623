"""TarFlowLM for Hugging Face Transformers: language models as transformer autoregressive flows."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.modeling_tarflowlm import TarFlowLMModel

__version__ = "0.1.0"

AutoConfig.register("tarflowlm", TarFlowLMConfig, exist_ok=True)
AutoModel.register(TarFlowLMConfig, TarFlowLMModel, exist_ok=True)
AutoModelForCausalLM.register(TarFlowLMConfig, TarFlowLMModel, exist_ok=True)
# The code itself goes along with every checkpoint that is saved.
TarFlowLMConfig.register_for_auto_class()
TarFlowLMModel.register_for_auto_class("AutoModel")

__all__ = ["TarFlowLMConfig", "TarFlowLMModel"]
