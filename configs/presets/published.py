"""The architectures that the field publishes, at sizes that one compares: linear and hybrid models in their published shapes.

Rows of 4,096 tokens unless a shape has its own. Give your corpus with `--data.source` (a folder of .txt, .jsonl or .parquet files).
None has been run on hardware yet; `docs/reproductions.md` has the plans that were made.
"""

from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import OptimizerConfig, optimizer
from plait.data.config import DataConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.base_conv import BaseConvConfig
from plait.models.mixers.linear.based import BasedConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.linear.lightning import LightningConfig
from plait.models.mixers.linear.mamba1 import Mamba1Config
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.linear.retnet import RetNetConfig
from plait.models.mixers.linear.titans_mac import TitansMACConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.positions.rotary import RotaryConfig

_VOCAB = 32_000


def gdn_340m() -> ExperimentConfig:
    """Gated DeltaNet throughout (2412.06464): 21 layers of width 1,024, the depth of the paper's 1.3B.

    Command: `python launch.py train gdn_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: the study's language-model average for pure gated DeltaNet, the mean of 340M and 1.3B, is 0.487; not yet run here.
    """
    return _run("gdn_340m", _lm("gated_deltanet", {"gated_deltanet": GatedDeltaNetConfig()}, num_layers=21, hidden_dim=2816))


def hgrn2_340m() -> ExperimentConfig:
    """HGRN2 throughout (2404.07904), as in the hybrid study's pure models: 24 layers of width 1,024, heads of 128.

    Command: `python launch.py train hgrn2_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: the study's language-model average for pure HGRN2, the mean of 340M and 1.3B, is 0.486; not yet run here.
    """
    return _run("hgrn2_340m", _lm("hgrn2", {"hgrn2": HGRN2Config()}, hidden_dim=2816))


def retnet_340m() -> ExperimentConfig:
    """RetNet throughout (2307.08621), as in the hybrid study's pure models: 24 layers of width 1,024, values of twice that.

    Command: `python launch.py train retnet_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: the study's language-model average for pure RetNet, the mean of 340M and 1.3B, is 0.471; not yet run here.
    """
    return _run("retnet_340m", _lm("retnet", {"retnet": RetNetConfig()}, hidden_dim=1536))


def mamba2_370m() -> ExperimentConfig:
    """Mamba-2 as released at 370M (2405.21060): 48 layers of width 1,024 without channel mixers, the head tied to the embedding.

    Command: `python launch.py train mamba2_370m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: not stated for this data; not yet run here.
    """
    model = _lm(
        "mamba2",
        {"mamba2": Mamba2Config()},
        num_layers=48,
        hidden_dim=None,
        tie_embeddings=True,
        norm_eps=1e-5,
        vocab_size=50_288,
    )
    return _run("mamba2_370m", model)


def based_360m() -> ExperimentConfig:
    """Based as released at 360M (2402.18668): 5 Taylor, 5 sliding-window and 17 short gated convolution layers of width 1,024.

    Command: `python launch.py train based_360m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: the paper's perplexity on the Pile; not yet run here.
    """
    model = _lm(
        "based@1,6,11,16,21; softmax@2,7,12,17,22; base_conv",
        {
            "based": BasedConfig(num_heads=16),
            "softmax": SoftmaxConfig(num_heads=16, head_dim=64, window_size=256),
            "base_conv": BaseConvConfig(),
        },
        num_layers=27,
        hidden_dim=2048,
        norm_eps=1e-5,
        vocab_size=50_304,
    )
    recipe = optimizer("adamw", learning_rate=8e-4, warmup_steps=200, final_ratio=0.1)
    return _run("based_360m", model, steps=20_000, seq_len=2048, batch_size=256, recipe=recipe)


def titans_340m() -> ExperimentConfig:
    """Titans with memory as context (2501.00663) at 340M: 20 layers of width 1,024; the paper does not state its depth.

    Layers are computed again in the backward pass: it would keep the memory of every chunk.

    Command: `python launch.py train titans_340m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 80 GB.
    Expected: the paper trains 340M on 15B tokens, rows of 4,096; its numbers are not yet met here.
    """
    recipe = optimizer("adamw", learning_rate=4e-4, warmup_steps=1000)
    model = _lm("titans_mac", {"titans_mac": TitansMACConfig()}, num_layers=20, hidden_dim=2816, remat="full")
    return _run("titans_340m", model, steps=28_600, recipe=recipe)


def hymba_350m() -> ExperimentConfig:
    """Hymba's shape at 350M (2411.13676): softmax and Mamba heads side by side in 32 layers of width 768, three of them with full attention.

    Its meta tokens and the sharing of keys and values between neighbouring layers are left out; queries, keys and values are equally wide.

    Command: `python launch.py train hymba_350m --data.source CORPUS --mesh.fsdp 8`. Device: 8 accelerators of 40 GB or more.
    Expected: not stated for this data; not yet run here.
    """

    def both(window_size: int | None) -> ParallelConfig:
        softmax = SoftmaxConfig(num_heads=12, num_kv_heads=4, head_dim=128, window_size=window_size)
        return ParallelConfig(parts=(softmax, Mamba1Config()), norm="heads", shared_output=True)

    model = _lm(
        "parallel/full@0,15,31; parallel",
        {"parallel/full": both(None), "parallel": both(1024)},
        d_model=768,
        num_layers=32,
        hidden_dim=2304,
        tie_embeddings=True,
    )
    return _run("hymba_350m", model)


def kimi_linear_1b() -> ExperimentConfig:
    """Kimi Linear (2510.26692) in its scaling study's shape of 1.1B activated of 6.3B parameters: three KDA layers to one MLA layer without
    positions, 20 layers and heads, width 1,536, 8 of 64 experts in all layers but the first.

    The paper does not state the experts' width; this one gives the stated size. Its first layer is a KDA layer with a dense MLP.

    Command: `python launch.py train kimi_linear_1b --data.source CORPUS --mesh.fsdp 64`. Device: 64 accelerators.
    Expected: the study's law gives a loss of 2.2879 C^-0.0527, C in PFLOP/s-days; not yet run here.
    """
    kda = KDAConfig(num_heads=20)
    mla = MLAConfig(num_heads=20, kv_rank=512, positions=None)
    experts = MoEConfig(
        num_experts=64, top_k=8, num_shared_experts=1, hidden_dim=1024, scores="sigmoid", balance_bias=1e-3, balance_loss=None
    )
    model = _lm(
        "kda/dense@0; mla@3,7,11,15,19; kda",
        {"kda/dense": kda, "kda": kda, "mla": mla},
        d_model=1536,
        num_layers=20,
        moe=experts,
        channel_mixers={"kda/dense": GatedMLPConfig(hidden_dim=6144)},
    )
    recipe = optimizer("muon", learning_rate=1.617e-3, warmup_steps=1000)
    return _run("kimi_linear_1b", model, steps=40_600, batch_size=512, recipe=recipe)


def qwen3_next_1b() -> ExperimentConfig:
    """Qwen3-Next's layers at 1B activated of 9.5B parameters: three gated DeltaNet layers, twice as many value as key heads, to one gated
    softmax layer with normalised queries and keys and a quarter of its channels rotated; mixtures of experts throughout.

    Command: `python launch.py train qwen3_next_1b --data.source CORPUS --mesh.fsdp 64`. Device: 64 accelerators.
    Expected: not published at this size; not yet run here.
    """
    linear = GatedDeltaNetConfig(num_heads=8, num_v_heads=16, head_dim=128, expand_v=1.0, norm_eps=1e-6)
    softmax = SoftmaxConfig(
        num_heads=8,
        num_kv_heads=2,
        head_dim=256,
        qk_norm=True,
        gate="elementwise",
        positions=RotaryConfig(theta=1e7, fraction=0.25),
    )
    experts = MoEConfig(num_experts=128, top_k=10, num_shared_experts=1, hidden_dim=640)
    model = _lm(
        "gated_deltanet*3,softmax",
        {"gated_deltanet": linear, "softmax": softmax},
        d_model=1536,
        num_layers=24,
        moe=experts,
        norm_kind="rms_1p",
    )
    return _run("qwen3_next_1b", model, steps=40_000, batch_size=512)


def minimax_1b() -> ExperimentConfig:
    """MiniMax-01's layers (2501.08313) at 1B activated of 14.9B parameters: seven lightning attention layers to one softmax layer with half
    of its channels rotated, 2 of 32 experts.

    Command: `python launch.py train minimax_1b --data.source CORPUS --mesh.fsdp 64`. Device: 64 accelerators.
    Expected: not published at this size; not yet run here.
    """
    softmax = SoftmaxConfig(num_heads=12, num_kv_heads=2, head_dim=128, positions=RotaryConfig(theta=1e7, fraction=0.5))
    experts = MoEConfig(num_experts=32, top_k=2, hidden_dim=4096)
    model = _lm(
        "lightning*7,softmax", {"lightning": LightningConfig(), "softmax": softmax}, d_model=1536, num_layers=24, moe=experts
    )
    return _run("minimax_1b", model, steps=40_000, batch_size=512)


def _lm(
    pattern: str,
    mixers: dict,
    *,
    hidden_dim: int | None = None,
    moe: MoEConfig | None = None,
    d_model: int = 1024,
    num_layers: int = 24,
    vocab_size: int = _VOCAB,
    **options,
) -> LMConfig:
    dense = None if hidden_dim is None else GatedMLPConfig(hidden_dim=hidden_dim)
    return LMConfig(
        d_model=d_model,
        num_layers=num_layers,
        pattern=pattern,
        mixers=mixers,
        channel_mixer=moe or dense,
        vocab_size=vocab_size,
        compute_dtype="bfloat16",
        **{"remat": "dots", **options},
    )


def _run(
    name: str,
    model: LMConfig,
    *,
    steps: int = 38_000,
    seq_len: int = 4096,
    batch_size: int = 128,
    recipe: OptimizerConfig | None = None,
) -> ExperimentConfig:
    return ExperimentConfig(
        name=name,
        steps=steps,
        model=model,
        data=DataConfig(tokenizer="bpe", vocab_size=_VOCAB, seq_len=seq_len, batch_size=batch_size),
        optimizer=recipe or optimizer("adamw", learning_rate=1e-3, warmup_steps=1000),
        probe_every=100,
        eval_every=1000,
        eval_batches=64,
        checkpoint_every=1000,
        keep_last=3,
    )
