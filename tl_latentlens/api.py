"""The names of the package, gathered from its rooms; `tl_latentlens` loads them when the first is asked for."""

from tl_latentlens.bank.bank import Bank, Row
from tl_latentlens.bank.build import build_bank, record_model
from tl_latentlens.bank.merge import merge_bank
from tl_latentlens.bank.own_model import load_model_of
from tl_latentlens.bank.planning import plan_corpus
from tl_latentlens.bank.ray_build import build_bank_on_ray
from tl_latentlens.bank.record import bank_hooks
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, Prompts, make_plan, prompts_from_lists
from tl_latentlens.corpus.texts import load_corpus
from tl_latentlens.directions.decode import decode_directions
from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.features.label import label_features
from tl_latentlens.directions.features.result import FeatureResult
from tl_latentlens.directions.features.sae import load_sae
from tl_latentlens.directions.features.sentences.describe import describe_features
from tl_latentlens.directions.find.features import find_features
from tl_latentlens.directions.find.heads import find_heads
from tl_latentlens.directions.find.neurons import find_neurons
from tl_latentlens.directions.find.result import FindResult, Meaning
from tl_latentlens.directions.steering.difference_of_means import difference_of_means
from tl_latentlens.directions.steering.lens import SteeringLens
from tl_latentlens.directions.steering.result import SteeringResult
from tl_latentlens.endpoint.chat import ChatEndpoint
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
from tl_latentlens.evaluation.evaluate import Evaluation, evaluate
from tl_latentlens.evaluation.labelled_uses import load_senses
from tl_latentlens.index.bank_plan import BankPlan, plan_bank
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.near_word import NearWord
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.lens.followed import FollowedTokens
from tl_latentlens.lens.hook import LatentLensHook
from tl_latentlens.lens.lens_hooks import latentlens_hooks
from tl_latentlens.lens.lenses import embedding_lens, logit_lens
from tl_latentlens.lens.result import LensResult
from tl_latentlens.lens.word_strip import WordStrip
from tl_latentlens.model.image_tokens import image_positions
from tl_latentlens.model.loading import load_demo_model, load_model
from tl_latentlens.model.repeated import RepeatedTexts, repeated
from tl_latentlens.search.vectors import VectorSearch
from tl_latentlens.vision.image_page import image_to_html, image_to_png
from tl_latentlens.vision.judge.judge import Judge, JudgeEstimate
from tl_latentlens.vision.judge.judgments import Judgments
from tl_latentlens.vision.judge.questions import JudgeQuestions
from tl_latentlens.vision.judge.sampling import judge_questions
from tl_latentlens.vision.keys import block_attention, key_spread
from tl_latentlens.vision.patch_grid import PatchGrid
from tl_latentlens.vision.patches import patch_grids
from tl_latentlens.vision.scenes import load_demo_vlm

__all__ = [
    "Bank",
    "BankCorruptError",
    "BankError",
    "BankPlan",
    "BankWriter",
    "ChatEndpoint",
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
    "NearWord",
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
    "WordSearchResult",
    "WordStrip",
    "bank_hooks",
    "block_attention",
    "build_bank",
    "build_bank_on_ray",
    "decode_directions",
    "describe_features",
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
    "load_model_of",
    "load_sae",
    "load_senses",
    "logit_lens",
    "make_plan",
    "merge_bank",
    "patch_grids",
    "plan_bank",
    "plan_corpus",
    "prompts_from_lists",
    "record_model",
    "repeated",
]
