"""Every recipe in hooks/ runs on each model class, prints what it promises, and stands in the README's table."""

import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.controls import few_controls, few_texts
from support.models import available_kinds

import tl_latentlens as tll

HOOKS = Path(__file__).parents[2] / "hooks"
RECIPES = sorted(HOOKS.glob("*.py"))
# What the output must hold, as regular expressions: hook names and the contexts (or tokens) they were read by. A generation
# starts at position 1, since BOS is not decoded, and has the new tokens joined to the prompt.
PROMISED = {
    "block_visual_keys.py": [
        r"blocks\.1\.attn\.hook_k\[1\] of the patch at position 6: 0\.\d\d  .*«.+»",
        r"blocks\.1\.attn\.hook_v\[1\] of the patch",
        r"spread of blocks\.1\.attn\.hook_k: 0\.\d\d to 0\.\d\d",
        r"loss \d\.\d+; 4 keys a head blocked: of least spread \d\.\d+, at random \d\.\d+",
    ],
    "decode_generation.py": [r"blocks\.4\.hook_resid_post", r"resid_post\n  1 'The' +next '.+near .*«.+»", r"\n 10 '"],
    "decode_head_output.py": [
        r"3 attn\.z\[0\]  +0\.\d\d  .*«.+»",
        r"3 attn\.z\[3\] ",
        r"3 attn\.result\[3\]  .*«.+»",
    ],
    "decode_mlp_out.py": [r"blocks\.0\.hook_mlp_out on '", r"blocks\.5\.hook_mlp_out on '", r"  [01]\.\d\d  blocks.*«.+»"],
    "decode_residual_stream.py": [r"blocks\.0\.hook_resid_post", r"by the logit lens: '", r"[01]\.\d\d  .*«bank»"],
    "decode_steering_vector.py": [
        r"\+v \(water\)\n  \+0\.\d\d  .*«.+»",
        r"-v \(forest\)\n  \+0\.\d\d  .*«.+»",
        r"unsteered +× 1 +× 2 +× 4",
        r"5 +0\.\d\d( +0\.\d\d · 0\.\d\d){3}",
    ],
    "decode_visual_tokens.py": [
        r"PatchGrid\(4 × 4 patches of a 32 × 32 image, batch 0\), at positions 1 to 16",
        r"pixels 8, 8 to 16, 16\n  blocks\.0\.hook_resid_pre  nearest input embeddings: \['.+'\]\n    [01]\.\d\d  .*«.+»",
        r"pixels 24, 24 to 32, 32\n",
        r"image\.html: \d+ kB",
    ],
    "find_writers.py": [
        r"'bank', as in\n  0\.\d\d  .*«bank»",
        r"feature \d+: \d+% of it \(p = [01]\.\d\d\), .+",
        r"head \d\.\d: \d+% of it \(p = [01]\.\d\d\), attends most to '.+'",
        r"neuron \d\.\d+: \d+% of it",
    ],
    "label_sae_feature.py": [
        r"resid_post at ' street'",
        r"feature \d+, activation \d+\.\d: .+ \(writes \w.*, .+, .+\)",
        r"\d\.\d  .*«.+»",
    ],
    "record_own_loop.py": [r"\d+ tokens on \w+.*, loss \d+\.\d\d", r"\d+ rows of blocks\.2\.hook_resid_post", r"row 7: .*«.+»"],
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_prints_what_it_promises(
    recipe: Path, demo_model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if recipe.stem in ("block_visual_keys", "decode_visual_tokens") and "bridge" not in available_kinds():
        pytest.skip("no TransformerBridge")
    monkeypatch.setattr(tll, "load_demo_model", lambda: demo_model)  # each class that is installed, loaded once
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with few_controls(), few_texts(4):
        runpy.run_path(str(recipe), run_name="__main__")
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert not any(point.fwd_hooks for point in demo_model.hook_dict.values())
    for pattern in PROMISED[recipe.name]:
        assert re.search(pattern, printed), f"{pattern} is not in:\n{printed}"


def test_readme_table_lists_every_recipe() -> None:
    rows = [line for line in (HOOKS / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert sorted(row[0] for row in cells) == [f"[`{path.name}`]({path.name})" for path in RECIPES]
    assert {row[-1] for row in cells} == {f"`python hooks/{path.name}`" for path in RECIPES}
    assert all(len(row) == 5 and all(row) for row in cells)


def test_no_recipe_shadows_a_module() -> None:
    package = Path(tll.__file__).parent
    modules = {path.stem for folder in (package, package / "hooks") for path in folder.glob("*.py")}
    assert not modules & {path.stem for path in RECIPES}  # also refuses __init__.py, which would make hooks/ a package
    assert set(PROMISED) == {path.name for path in RECIPES}
