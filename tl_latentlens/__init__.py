"""Read any vector of a language model by its nearest contextual neighbors: LatentLens for TransformerLens."""

from tl_latentlens.bank import Bank, Row
from tl_latentlens.build import build_bank, plan_corpus, record_model
from tl_latentlens.corpus import load_corpus
from tl_latentlens.directions import decode_directions
from tl_latentlens.errors import (
    BankCorruptError,
    BankError,
    CorpusError,
    InvalidInputError,
    LatentLensError,
    MissingExtraError,
    ModelMismatchError,
    UnknownHookError,
)
from tl_latentlens.evaluate import Evaluation, evaluate
from tl_latentlens.features import label_features
from tl_latentlens.find import find_features, find_heads, find_neurons
from tl_latentlens.followed import FollowedTokens
from tl_latentlens.hooks.decode import LatentLensHook, latentlens_hooks
from tl_latentlens.hooks.record import bank_hooks
from tl_latentlens.index import ContextualIndex, SearchResult
from tl_latentlens.judge import Judge, JudgeEstimate, JudgeQuestions, judge_questions
from tl_latentlens.judgments import Judgments
from tl_latentlens.keys import block_attention, key_spread
from tl_latentlens.lenses import embedding_lens, logit_lens
from tl_latentlens.loading import load_demo_model, load_demo_vlm, load_model
from tl_latentlens.model import RepeatedTexts, repeated
from tl_latentlens.plan import Plan, PlanSettings, Prompts, make_plan, prompts_from_lists
from tl_latentlens.results import DirectionResult, FeatureResult, FindResult, LensResult, Meaning, Neighbor
from tl_latentlens.sae import load_sae
from tl_latentlens.search import VectorSearch
from tl_latentlens.senses import load_senses
from tl_latentlens.steering import SteeringLens, SteeringResult, difference_of_means
from tl_latentlens.views.image import image_to_html, image_to_png
from tl_latentlens.vision import PatchGrid, image_positions, patch_grids
from tl_latentlens.writer import BankWriter

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "BankCorruptError",
    "BankError",
    "BankWriter",
    "ContextualIndex",
    "CorpusError",
    "DirectionResult",
    "Evaluation",
    "FeatureResult",
    "FindResult",
    "FollowedTokens",
    "InvalidInputError",
    "Judge",
    "JudgeEstimate",
    "JudgeQuestions",
    "Judgments",
    "LatentLensError",
    "LatentLensHook",
    "LensResult",
    "Meaning",
    "MissingExtraError",
    "ModelMismatchError",
    "Neighbor",
    "PatchGrid",
    "Plan",
    "PlanSettings",
    "Prompts",
    "RepeatedTexts",
    "Row",
    "SearchResult",
    "SteeringLens",
    "SteeringResult",
    "UnknownHookError",
    "VectorSearch",
    "bank_hooks",
    "block_attention",
    "build_bank",
    "decode_directions",
    "difference_of_means",
    "embedding_lens",
    "evaluate",
    "find_features",
    "find_heads",
    "find_neurons",
    "image_positions",
    "image_to_html",
    "image_to_png",
    "judge_questions",
    "key_spread",
    "label_features",
    "latentlens_hooks",
    "load_corpus",
    "load_demo_model",
    "load_demo_vlm",
    "load_model",
    "load_sae",
    "load_senses",
    "logit_lens",
    "make_plan",
    "patch_grids",
    "plan_corpus",
    "prompts_from_lists",
    "record_model",
    "repeated",
]
