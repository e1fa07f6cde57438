"""VoVNet-V2 against the paper's table, and where its attention is."""

import jax
import jax.numpy as jnp
import pytest

import se_flax

# Lee and Park 2020, table 1: width of the 3x3 layers and of the output, and blocks, stage by stage; layers in a block.
PAPER = {
    "ese_vovnet39b": ((128, 160, 192, 224), (256, 512, 768, 1024), (1, 1, 2, 2), 5),
    "ese_vovnet57b": ((128, 160, 192, 224), (256, 512, 768, 1024), (1, 1, 4, 3), 5),
    "ese_vovnet99b": ((128, 160, 192, 224), (256, 512, 768, 1024), (1, 3, 9, 3), 5),
}


def shapes_of(name, **attributes):
    model = se_flax.create_model(name, **attributes)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


@pytest.mark.parametrize("name", PAPER)
def test_stages_are_the_papers(name):
    widths, features, depths, layers = PAPER[name]
    params = shapes_of(name)
    before = 128
    for stage, (width, out, depth) in enumerate(zip(widths, features, depths, strict=True)):
        blocks = params[f"stages_{stage}"]
        assert set(blocks) == {f"blocks_{i}" for i in range(depth)}
        for block in blocks.values():
            kernels = [block[f"conv_mid_{i}"]["conv"]["kernel"].shape for i in range(layers)]
            assert kernels == [(3, 3, before, width)] + [(3, 3, width, width)] * (layers - 1)
            # Section 3.1: the input and all layers are joined at once.
            assert block["conv_concat"]["conv"]["kernel"].shape == (1, 1, before + layers * width, out)
            before = out
        # Section 3.3: effective SE has one full layer; it is in a stage's last block.
        assert [name for name, block in blocks.items() if "attn" in block] == [f"blocks_{depth - 1}"]
        assert blocks[f"blocks_{depth - 1}"]["attn"]["fc"]["kernel"].shape == (1, 1, out, out)


def test_attention_is_what_is_asked_for():
    assert "attn" not in str(shapes_of("ese_vovnet19b_slim", attention=None))
    chosen = shapes_of("ese_vovnet19b_slim", attention=se_flax.SqueezeExcite, stages=(3,))
    found = {stage: blocks["blocks_0"].get("attn", {}) for stage, blocks in chosen.items() if "stages" in stage}
    assert found["stages_1"]["fc1"]["kernel"].shape == (1, 1, 256, 16)
    assert not found["stages_0"] and not found["stages_2"] and not found["stages_3"]


def test_evonorm_takes_a_number_of_groups():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 64))
    by_count, by_size = se_flax.nn.norm.EvoNormS0(groups=16), se_flax.nn.norm.EvoNormS0(group_size=4)
    variables = by_count.init(jax.random.key(0), x)
    assert jnp.array_equal(by_count.apply(variables, x), by_size.apply(variables, x))
