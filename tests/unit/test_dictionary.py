"""Laws of the SAE modules."""

import pytest
import torch

from dictionary_learning.dictionary import DICTIONARIES, AutoEncoder, IdentityDict, TopKDictionary

D, F, B = 10, 30, 7


def make(name: str):
    top_k = {"AutoEncoderTopK": {}, "BatchTopKSAE": {}, "MatryoshkaBatchTopKSAE": {"group_sizes": [10, 20]}}
    extra = {"k": 3, **top_k[name]} if name in top_k else {}
    sae = DICTIONARIES[name](D, F, **extra, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for bias in sae.biases:
            sae.state_dict()[bias].normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
        if isinstance(sae, TopKDictionary):
            sae.threshold.fill_(0.2)
        elif name == "JumpReluAutoEncoder":
            sae.threshold.abs_()
    return sae


@pytest.fixture
def x_BD():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", DICTIONARIES)
def test_scale_biases_moves_the_sae_to_scaled_activations(name, x_BD):
    sae = make(name)
    x_hat_BD, f_BF = sae(x_BD, output_features=True)
    sae.scale_biases(3.0)
    scaled_x_hat_BD, scaled_f_BF = sae(3 * x_BD, output_features=True)
    torch.testing.assert_close(scaled_x_hat_BD, 3 * x_hat_BD)
    torch.testing.assert_close(scaled_f_BF, 3 * f_BF)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_file_roundtrip(name, x_BD, tmp_path):
    sae = make(name)
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    options = {"normalize_decoder": False} if name == "AutoEncoder" else {}
    again = DICTIONARIES[name].from_pretrained(tmp_path / "ae.pt", **options)
    assert (again.activation_dim, again.dict_size) == (D, F)
    assert again(x_BD).equal(sae(x_BD))
    state = sae.state_dict()
    state["more"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="more"):
        DICTIONARIES[name].from_state(state)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_latents_are_rows_in_memory(name):
    sae = make(name)
    assert sae.encoder_FD.shape == sae.decoder_FD.shape == (F, D)
    assert sae.encoder_FD.is_contiguous() and sae.decoder_FD.is_contiguous()


@pytest.mark.parametrize("name", DICTIONARIES)
def test_any_leading_shape(name, x_BD):
    """Features of a token do not depend on how tokens are laid out, nor (at the threshold) on its neighbours."""
    sae = make(name)
    torch.testing.assert_close(sae.encode(x_BD[:6].view(2, 3, D)).view(6, F), sae.encode(x_BD)[:6])


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_top_k_modes(name, x_BD):
    sae = make(name)
    exact_BF = sae.encode(x_BD, use_threshold=False)
    assert (exact_BF != 0).sum() == 3 * B
    if name == "AutoEncoderTopK":
        assert ((exact_BF != 0).sum(1) == 3).all()
    assert sae.encode(x_BD).equal(sae.encode(x_BD, use_threshold=True))
    sae.threshold.fill_(-1.0)  # not recorded
    assert sae.encode(x_BD).equal(exact_BF)
    assert sae.encode(x_BD[None], use_threshold=False)[0].equal(exact_BF)


@pytest.mark.parametrize("rows", ["random", "ties", "few positive", "nan"])
@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_exact_top_k_is_that_of_torch(name, rows):
    """Whatever way it is found: as many as torch's topk keeps, of the same values, with its gradient."""
    sae, generator = make(name), torch.Generator().manual_seed(0)
    post_relu_BF = torch.relu(torch.randn(B, F, generator=generator))
    if rows == "ties":  # the third largest of every token, and as many as k B of the batch, several times
        post_relu_BF = post_relu_BF.round()
    if rows == "few positive":
        post_relu_BF[:, 1:] = 0
    if rows == "nan":
        post_relu_BF[2, 5] = torch.nan
    post_relu_BF.requires_grad_()
    kept_BF = sae.select(post_relu_BF, use_threshold=False)
    by_row = kept_BF if name == "AutoEncoderTopK" else kept_BF.flatten()
    all_rows = post_relu_BF if name == "AutoEncoderTopK" else post_relu_BF.flatten()
    k = 3 if name == "AutoEncoderTopK" else 3 * B
    torch.testing.assert_close(
        by_row.sort(-1, descending=True).values[..., :k],
        all_rows.topk(k, dim=-1).values,
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert ((by_row != 0).sum(-1) <= k).all()
    (grad_BF,) = torch.autograd.grad(kept_BF.sum(), post_relu_BF)
    assert grad_BF[kept_BF > 0].eq(1).all() and not grad_BF[(kept_BF == 0) & (post_relu_BF > 0)].any()


@pytest.mark.filterwarnings("ignore")  # torch deprecates tracing
@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_exact_top_k_can_be_transformed(name, x_BD):
    """By torch.func, where tensors have no values to see, and by torch.jit.trace, which must not keep those it sees."""
    sae = make(name).requires_grad_(False)

    def encode(x_BD):
        return sae.encode(x_BD, use_threshold=False)

    batches_SBD = torch.stack([x_BD, 2 * x_BD.flip(0)])
    expected_SBF = torch.stack([encode(batch_BD) for batch_BD in batches_SBD])
    torch.testing.assert_close(torch.func.vmap(encode)(batches_SBD), expected_SBF)
    (grad_BD,) = torch.autograd.grad(encode(x_BD.requires_grad_()).sum(), x_BD)
    torch.testing.assert_close(torch.func.grad(lambda x_BD: encode(x_BD).sum())(x_BD.detach()), grad_BD)
    traced = torch.jit.trace(encode, (batches_SBD[0],), check_trace=False)
    torch.testing.assert_close(traced(batches_SBD[1]), expected_SBF[1])


def test_fewer_active_groups_use_the_first_latents_only(x_BD):
    sae = make("MatryoshkaBatchTopKSAE")
    whole_BF = sae.encode(x_BD)
    sae.active_groups = 1
    part_BF = sae.encode(x_BD.view(1, B, D))[0]
    assert part_BF[:, :10].equal(whole_BF[:, :10]) and not part_BF[:, 10:].any()
    assert whole_BF[:, 10:].any()


def test_normalize_decoder_keeps_the_function(x_BD):
    sae = AutoEncoder(D, F, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.decoder.weight[:, 4] = 0  # a latent that writes nothing
    before = sae(x_BD)
    sae.normalize_decoder()
    torch.testing.assert_close(sae(x_BD), before)
    norms_F = sae.decoder_FD.norm(dim=1)
    torch.testing.assert_close(norms_F[norms_F > 0], torch.ones(F - 1))


def test_identity(x_BD):
    assert IdentityDict(D)(x_BD) is x_BD


def test_k_and_groups_are_checked():
    with pytest.raises(ValueError, match="positive integer"):
        DICTIONARIES["BatchTopKSAE"](D, F, k=0)
    with pytest.raises(ValueError, match="group sizes"):
        DICTIONARIES["MatryoshkaBatchTopKSAE"](D, F, k=2, group_sizes=[10, 10])
