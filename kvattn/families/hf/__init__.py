"""The families of HuggingFace's transformers.

To add one, write a file here that registers a `kvattn.families.Family`, and import it below.
"""

from kvattn.families.hf import bloom as bloom
from kvattn.families.hf import chatglm as chatglm
from kvattn.families.hf import cohere2 as cohere2
from kvattn.families.hf import deepseek as deepseek
from kvattn.families.hf import falcon as falcon
from kvattn.families.hf import gemma as gemma
from kvattn.families.hf import gemma4 as gemma4
from kvattn.families.hf import glm4 as glm4
from kvattn.families.hf import gpt2 as gpt2
from kvattn.families.hf import gpt_neo as gpt_neo
from kvattn.families.hf import gpt_neox as gpt_neox
from kvattn.families.hf import gpt_oss as gpt_oss
from kvattn.families.hf import granite as granite
from kvattn.families.hf import lfm2 as lfm2
from kvattn.families.hf import llama as llama
from kvattn.families.hf import llama4 as llama4
from kvattn.families.hf import mamba as mamba
from kvattn.families.hf import minicpm3 as minicpm3
from kvattn.families.hf import minimax as minimax
from kvattn.families.hf import mixtral as mixtral
from kvattn.families.hf import olmo2 as olmo2
from kvattn.families.hf import others as others
from kvattn.families.hf import phi3 as phi3
from kvattn.families.hf import qwen as qwen
from kvattn.families.hf import qwen3_next as qwen3_next
from kvattn.families.hf import qwen_moe as qwen_moe
from kvattn.families.hf import smollm3 as smollm3
from kvattn.families.hf import stablelm as stablelm
from kvattn.families.hf import starcoder2 as starcoder2
