"""The settings of an SAE, read from the configuration that SAELens saves beside it (`cfg.json`), of any version.

Each setting is one that `sae_encoders` follows, or an error that names it: none is passed over.
"""

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from tl_latentlens.directions.features.sae_encoders import ENCODERS, NORMALIZATIONS
from tl_latentlens.errors import InvalidInputError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_TOPK = ("topk", "abstopk")
_PURSUIT = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
_ENCODER_SETTINGS = frozenset({
    "architecture", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "k", "rescale_acts_by_decoder_norm",
    "apply_b_dec_to_input", "normalize_activations", "reshape_activations", "finetuning_scaling_factor", *_PURSUIT,
})  # fmt: skip
_BOOKKEEPING = frozenset(
    """
    metadata sae_lens_version sae_lens_training_version d_in d_sae d_out dtype device use_error_term neuronpedia_id
    model_name model_class_name model_kwargs model_from_pretrained_kwargs tokenizer_name llm_device release sae_id
    hook_name hook_point hook_name_out hook_head_index hook_point_head_index hook_head_index_out hook_layer hook_layer_out
    hook_point_layer hook_point_eval hook_eval hf_hook_name hf_hook_name_out
    dataset_path dataset_trust_remote_code dataset_name dataset_kwargs streaming is_dataset_tokenized column_name data_files
    context_size prepend_bos seqpos_slice exclude_special_tokens sequence_separator_token begin_batch_token
    begin_sequence_token disable_concat_sequences use_chat_formatting use_cached_activations cached_activations_path
    new_cached_activations_path n_batches_in_buffer store_batch_size store_batch_size_prompts train_batch_size
    train_batch_size_tokens train_batch_size_samples eval_batch_size_prompts n_eval_batches n_eval_seqs
    n_batches_for_norm_estimate tokens_per_buffer training_tokens total_training_tokens total_training_steps
    total_training_samples finetuning_tokens finetuning_method finetuning_steps activations_mixing_fraction
    act_store_device autocast autocast_lm compile_llm compile_sae llm_compilation_mode sae_compilation_mode
    prefetch_llm_batches expansion_factor b_dec_init_method decoder_init_norm decoder_heuristic_init
    decoder_heuristic_init_norm decoder_orthogonal_init init_encoder_as_decoder_transpose normalize_sae_decoder
    scale_sparsity_penalty_by_decoder_norm noise_scale mse_loss_normalization l0_lambda l0_warm_up_steps l1_coefficient
    l1_loss_wd_norm l1_warm_up_steps lp_norm sparsity_loss_coefficient jumprelu_init_threshold jumprelu_bandwidth
    use_ghost_grads ghost_grads_start_step feature_reinit_scale resample_batches feature_sampling_method
    feature_sampling_window dead_feature_window dead_feature_threshold dead_feature_estimation_method
    aux_loss_coefficient topk_threshold_lr use_sparse_activations training_architecture training_architecture_details
    lr lr_end lr_scheduler_name lr_warm_up_steps lr_decay_steps n_restart_cycles adam_beta1 adam_beta2 seed verbose
    from_pretrained_path resume resume_from_checkpoint checkpoint_path n_checkpoints checkpoint_every_n_tokens output_path
    save_path save_final_checkpoint logger log_to_wandb log_weights_to_wandb log_optimizer_state_to_wandb
    log_activations_store_to_wandb run_name wandb_project wandb_id wandb_entity wandb_log_frequency
    eval_every_n_wandb_logs
""".split()
)  # Of the training, of the texts and of the model: none changes what the encoder gives.


@dataclass(frozen=True)
class SAESettings:
    """What an SAE's encoder does beside its tensors, and where it belongs.

    Attributes:
        architecture: One of `ENCODERS`.
        k: Features that stay active (topk, abstopk).
        rescale: Whether pre-activations are multiplied by the decoder's norms (topk, abstopk).
        subtracts_b_dec: Whether b_dec is subtracted from the activation.
        normalization: What is done to an activation first, one of `NORMALIZATIONS`.
        reads_heads: Whether the activation has an axis of heads, which is flattened.
        residual_threshold, max_iterations, stops_at_known_support: When matching pursuit ends.
        dtype: What the weights are computed in; None: as they are stored.
        hook_name, hook_name_out: The activations that it reads and writes, where known; `hook_name_out` of transcoders alone.
        model_name: The model that it was trained on, where known.
    """

    architecture: str = "standard"
    k: int | None = None
    rescale: bool = False
    subtracts_b_dec: bool = True
    normalization: str = "none"
    reads_heads: bool = False
    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stops_at_known_support: bool = True
    dtype: torch.dtype | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    model_name: str | None = None


def read_settings(config: dict[str, Any]) -> SAESettings:
    """The settings that a configuration of SAELens states, as SAELens understands them.

    Raises:
        InvalidInputError: A setting that is not known here, or that contradicts another.
    """
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        _refuse("metadata", metadata, "an object")
    for name, value in config.items():
        if name not in _BOOKKEEPING | _ENCODER_SETTINGS and value is not None:
            _refuse(name, value, "settings of SAELens alone")
    for name in _ENCODER_SETTINGS & metadata.keys():
        if metadata[name] not in (None, config.get(name)):
            _refuse(f"metadata.{name}", metadata[name], f"it to be what {name} outside of metadata says")
    is_legacy = _is_before_version_6(config.get("sae_lens_version") or metadata.get("sae_lens_version"))
    places = {**_without_none(config), **_without_none(metadata)}
    head = places.get("hook_head_index", places.get("hook_point_head_index"))
    hook_point = places.get("hook_name", places.get("hook_point"))  # SAELens 2 wrote "hook_point".
    architecture = _architecture(config, is_legacy)
    is_transcoder = architecture.endswith("transcoder")
    return SAESettings(
        architecture=architecture,
        k=_active_features(config, architecture, is_legacy),
        rescale=_boolean(config, "rescale_acts_by_decoder_norm", False, architecture in _TOPK),
        subtracts_b_dec=_boolean(config, "apply_b_dec_to_input", not is_transcoder, not is_transcoder),
        normalization=_normalization(config.get("normalize_activations"), is_legacy),
        reads_heads=_reads_heads(config, hook_point, head, is_legacy, is_transcoder),
        **_pursuit(config, architecture),
        dtype=_dtype(config.get("dtype")),
        hook_name=_with_head(hook_point, head),
        hook_name_out=_with_head(places.get("hook_name_out"), places.get("hook_head_index_out")) if is_transcoder else None,
        model_name=places.get("model_name"),
    )


def _is_before_version_6(version: Any) -> bool:
    """True for configurations of SAELens before version 6, which wrote other names and left defaults out."""
    if not version:
        return True
    match = re.match(r"v?(\d+)\b", str(version))
    if match is None:
        _refuse("sae_lens_version", version, 'a version, such as "6.54.0"')
    return int(match[1]) < 6


def _architecture(config: dict[str, Any], is_legacy: bool) -> str:
    """The architecture; before version 6 an SAE of architecture "standard" could have topk as its activation function."""
    architecture = config.get("architecture")
    if architecture is None and is_legacy:
        architecture = "standard"
    if not isinstance(architecture, str) or architecture not in ENCODERS:
        _refuse("architecture", architecture, f"one of {list(ENCODERS)}")
    functions = [config[key] for key in ("activation_fn", "activation_fn_str") if config.get(key) is not None]
    for function in functions:
        if function not in ("relu", "topk") or function != functions[0]:
            _refuse("activation_fn", functions if len(functions) > 1 else function, '"relu" or "topk"')
    if "topk" in functions and is_legacy and architecture == "standard":
        return "topk"
    if "topk" in functions and architecture != "topk":
        _refuse("activation_fn", "topk", f'"relu" for the architecture {architecture!r}')
    return architecture


def _active_features(config: dict[str, Any], architecture: str, is_legacy: bool) -> int | None:
    """The number of features that stay active, of topk SAEs alone."""
    arguments = config.get("activation_fn_kwargs") or {}
    unknown = arguments if not isinstance(arguments, dict) else {name: arguments[name] for name in arguments if name != "k"}
    if unknown:
        _refuse("activation_fn_kwargs", unknown, "k alone")
    numbers = [k for k in (config.get("k"), arguments.get("k")) if k is not None]
    if architecture not in _TOPK:
        if numbers:
            _refuse("k", numbers[0], f"none for the architecture {architecture!r}")
        return None
    if not numbers or not (is_legacy or config.get("k") is not None):
        raise InvalidInputError(
            f"got an SAE of architecture {architecture!r} whose configuration has no k; expected the number of features that "
            'stay active; add it to cfg.json: "k": ...'
        )
    k = numbers[0]
    if isinstance(k, bool) or not isinstance(k, int | float) or k != int(k) or k < 1 or numbers.count(k) < len(numbers):
        _refuse("k", k if len(numbers) == 1 else numbers, "one whole number, at least 1")
    return int(k)


def _normalization(value: Any, is_legacy: bool) -> str:
    if is_legacy and isinstance(value, bool):
        value = "expected_average_only_in" if value else "none"
    if value is None:
        return "none"
    if not isinstance(value, str) or value not in NORMALIZATIONS:
        _refuse("normalize_activations", value, f"one of {list(NORMALIZATIONS)}")
    return value


def _reads_heads(config: dict[str, Any], hook_name: Any, head: Any, is_legacy: bool, is_transcoder: bool) -> bool:
    """True where an SAE reads all heads of an activation. Before version 6 the hook name said it."""
    shape = config.get("reshape_activations")
    if shape not in (None, "none", "hook_z"):
        _refuse("reshape_activations", shape, '"none" or "hook_z"')
    if shape == "hook_z" and (is_transcoder or head is not None or not str(hook_name or "hook_z").endswith("_z")):
        of = "a transcoder" if is_transcoder else f"{hook_name}" if head is None else f"head {head} alone"
        _refuse("reshape_activations", shape, f'"none" for {of}')
    is_by_name = is_legacy and "reshape_activations" not in config and "hook_z" in str(hook_name)
    return not is_transcoder and head is None and (shape == "hook_z" or is_by_name)


def _pursuit(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """When matching pursuit ends, as far as the configuration says it."""
    stated = _without_none({name: config.get(name) for name in _PURSUIT})
    if stated and architecture != "matching_pursuit":
        _refuse(*next(iter(stated.items())), f"none for the architecture {architecture!r}")
    kinds = {"residual_threshold": (int, float), "max_iterations": int, "stop_on_duplicate_support": bool}
    for name, value in stated.items():
        if not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "stop_on_duplicate_support"):
            _refuse(name, value, "a number" if name != "stop_on_duplicate_support" else "true or false")
    names = {"stop_on_duplicate_support": "stops_at_known_support"}
    return {names.get(name, name): value for name, value in stated.items()}


def _boolean(config: dict[str, Any], name: str, default: bool, may_be_true: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool) or (value and not may_be_true):
        _refuse(name, value, "true or false" if may_be_true else "false for this architecture")
    return value


def _dtype(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    if str(name).removeprefix("torch.") not in _DTYPES:
        _refuse("dtype", name, f"one of {list(_DTYPES)}")
    return _DTYPES[str(name).removeprefix("torch.")]


def _with_head(hook_name: Any, head: Any) -> str | None:
    """A hook name, with the head where an SAE reads one alone."""
    return hook_name if hook_name is None or head is None else f"{hook_name}[{head}]"


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the error that names a setting."""
    raise InvalidInputError(
        f"got the SAE setting {name}={value!r}; expected {expected}. Correct cfg.json, or load the SAE with "
        "sae_lens.SAE.load_from_disk and pass the object"
    )
