"""The built-in studies: ablations and comparisons of the MAE paper, with the accuracies of the paper.

All accuracies are of He et al. 2021 (arXiv 2111.06377): ViT-L/16 on ImageNet, 800 epochs, top-1 in percent.
The arms are those of the paper where a small model allows. Decoder widths are fractions of the encoder
width, since the decoder of the paper, 512 wide with 8 blocks, belongs to an encoder of width 1024.

Names, claims and titles are part of the settings in ``plan.json``: with a changed text, a study that an
earlier version started cannot be resumed.
"""

from collections.abc import Mapping, Sequence

from quarterview.studies.study import Arm, Finding, Study, Table

_FINETUNE, _LINEAR = "finetune", "linear"
_TOKEN_FLAGS = {"target": "tokens", "tokenizer": "study"}
"""Flags of an arm that predicts the visual tokens of the tokenizer that the study trains first."""


def _paper_accuracies(finetune: float | None = None, linear: float | None = None) -> dict[str, float]:
    """Return the accuracies of the paper by measure, in percent, without those that the paper lacks."""
    return {k: v for k, v in ((_FINETUNE, finetune), (_LINEAR, linear)) if v is not None}


def _make_findings(claim: str, first: str, second: str, *measures: str) -> list[Finding]:
    """Return the finding that the first arm is ahead of the second, for each measure."""
    return [Finding(claim, first, second, measure) for measure in measures]


_DEPTH_ACCURACIES: Mapping[int, tuple[float, float]] = {
    **{1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}
}
"""Table 1a: accuracies of fine-tuning and of the linear probe, in percent, by decoder depth."""
_WIDTH_ACCURACIES: Mapping[int, tuple[float, float]] = {
    **{128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)}
}
"""Table 1b: accuracies of fine-tuning and of the linear probe, in percent, by decoder width.

The encoder is 1024 wide."""
_RATIO_ACCURACIES: Mapping[int, tuple[float, float]] = {
    **{10: (83.2, 54.6), 20: (83.4, 58.9), 30: (83.4, 61.7), 40: (84.7, 67.0), 50: (84.9, 69.9)},
    **{60: (85.0, 71.8), 70: (84.9, 73.2), 75: (84.9, 73.5), 80: (84.5, 71.8), 90: (83.0, 66.1)},
}
"""Figure 5: accuracies of fine-tuning and of the linear probe, in percent, by mask ratio in percent."""
_BLOCK_ACCURACIES: Mapping[str, tuple[float | None, float | None]] = {
    **{"0": (73.5, 77.6), "0.5": (79.1, None), "1": (81.0, 79.9), "2": (83.1, 80.8), "4": (84.2, 81.6)},
    **{"6": (84.4, 81.9), "all": (84.9, 84.1)},
}
"""Figure 9: accuracies of MAE and MoCo v3, in percent, by the number of fine-tuned blocks."""


def make_depth_table(depths: Sequence[int] = (1, 2, 4, 8)) -> Table:
    """Return the table of decoder depths (table 1a)."""
    return Table(
        "Decoder depth",
        tuple(
            Arm(
                f"{n} block{'s' * (n > 1)}",
                {"decoder_depth": n},
                x=n,
                paper=_paper_accuracies(*_DEPTH_ACCURACIES[n]),
            )
            for n in depths
        ),
        (
            Finding(
                "a one-block decoder suffices for fine-tuning", "1 block", "8 blocks", _FINETUNE, "as good"
            ),
            *_make_findings("a deep decoder serves the linear probe", "8 blocks", "1 block", _LINEAR),
        ),
        source="table 1a",
        axis="blocks of the decoder",
    )


def make_width_table(divisors: Sequence[int] = (8, 4, 2, 1)) -> Table:
    """Return the table of decoder widths (table 1b): the encoder width divided by each of the divisors."""
    return Table(
        "Decoder width",
        tuple(
            Arm(
                f"1/{n} of the encoder's" if n > 1 else "the encoder's",
                x=1 / n,
                decoder_share=1 / n,
                paper=_paper_accuracies(*_WIDTH_ACCURACIES[1024 // n]),
            )
            for n in divisors
        ),
        (
            Finding(
                "a narrow decoder suffices for fine-tuning",
                "1/8 of the encoder's",
                "1/2 of the encoder's",
                _FINETUNE,
                "as good",
            ),
            *_make_findings(
                "a wide decoder serves the linear probe",
                "1/2 of the encoder's",
                "1/8 of the encoder's",
                _LINEAR,
            ),
        ),
        source="table 1b",
        axis="width of the decoder, as a share of the encoder's",
    )


MASK_TOKENS = Table(
    "Mask tokens in the encoder",
    (
        Arm("with mask tokens", {"encoder_mask_tokens": True}, paper=_paper_accuracies(84.2, 59.6)),
        Arm("without", paper=_paper_accuracies(84.9, 73.5)),
    ),
    tuple(
        _make_findings(
            "the encoder is better without mask tokens", "without", "with mask tokens", _FINETUNE, _LINEAR
        )
    ),
    source="table 1c",
)
TARGETS = Table(
    "Target",
    (
        Arm("pixels", paper=_paper_accuracies(84.9, 73.5)),
        Arm("pixels, normalised", {"norm_pix_loss": True}, paper=_paper_accuracies(85.4, 73.9)),
        Arm("principal components", {"target": "pca"}, paper=_paper_accuracies(84.6, 72.3)),
        Arm("tokens", _TOKEN_FLAGS, paper=_paper_accuracies(85.3, 71.6)),
    ),
    (
        *_make_findings("normalising the pixels helps", "pixels, normalised", "pixels", _FINETUNE, _LINEAR),
        Finding("pixels do as well as tokens", "pixels, normalised", "tokens", _FINETUNE, "as good"),
        *_make_findings(
            "components are worse than pixels", "pixels", "principal components", _FINETUNE, _LINEAR
        ),
    ),
    source="table 1d",
)
AUGMENTATION = Table(
    "Augmentation",
    (
        Arm("none", {"crop": "none"}, paper=_paper_accuracies(84.0, 65.7)),
        Arm("crop, fixed size", {"crop": "fixed"}, paper=_paper_accuracies(84.7, 73.1)),
        Arm("crop, random size", paper=_paper_accuracies(84.9, 73.5)),
        Arm("crop and colour jitter", {"color_jitter": 0.4}, paper=_paper_accuracies(84.3, 71.9)),
    ),
    (
        Finding("augmentation matters little", "none", "crop, random size", _FINETUNE, "as good"),
        *_make_findings(
            "colour jitter harms", "crop, random size", "crop and colour jitter", _FINETUNE, _LINEAR
        ),
        *_make_findings("a crop serves the linear probe", "crop, random size", "none", _LINEAR),
    ),
    source="table 1e",
)
_CONTRASTIVE_ARMS = tuple(
    arm
    for name, method in (("SimCLR", "simclr"), ("BYOL", "byol"))
    for arm in (
        Arm(name, {"method": method}),
        Arm(f"{name}, crop only", {"method": method, "view_colors": False}),
    )
)
CONTRASTIVE_AUGMENTATION = Table(
    "Augmentation where views are compared",
    _CONTRASTIVE_ARMS,
    tuple(
        finding
        for name in ("SimCLR", "BYOL")
        for finding in _make_findings(f"{name} needs more than a crop", name, f"{name}, crop only", _LINEAR)
    ),
    measures=(_LINEAR, "knn"),
    source="section 4.1: with a crop alone BYOL loses 13 points and SimCLR 28",
)
MASK_SAMPLING = Table(
    "Mask sampling",
    (
        Arm("random 75%", paper=_paper_accuracies(84.9, 73.5)),
        Arm("block 50%", {"mask": "block", "mask_ratio": 0.5}, paper=_paper_accuracies(83.9, 72.3)),
        Arm("block 75%", {"mask": "block"}, paper=_paper_accuracies(82.8, 63.9)),
        Arm("grid 75%", {"mask": "grid"}, paper=_paper_accuracies(84.0, 66.0)),
    ),
    (
        *_make_findings("random masks are better than blocks", "random 75%", "block 75%", _FINETUNE, _LINEAR),
        *_make_findings("random masks are better than a grid", "random 75%", "grid 75%", _FINETUNE, _LINEAR),
        *_make_findings(
            "blocks are better at half than at three quarters", "block 50%", "block 75%", _FINETUNE, _LINEAR
        ),
    ),
    source="table 1f",
)


def make_ratio_table(ratios: Sequence[int] = (10, 25, 50, 75, 90)) -> Table:
    """Return the table of mask ratios in percent (figure 5)."""
    return Table(
        "Mask ratio",
        tuple(
            Arm(
                f"{n}%",
                {"mask_ratio": n / 100},
                x=n,
                paper=_paper_accuracies(*_RATIO_ACCURACIES[n]) if n in _RATIO_ACCURACIES else {},
            )
            for n in ratios
        ),
        (
            *_make_findings("a high ratio is better than a low one", "75%", "10%", _FINETUNE, _LINEAR),
            *_make_findings("hiding almost all is too much", "75%", "90%", _FINETUNE, _LINEAR),
            Finding("half and three quarters serve fine-tuning alike", "75%", "50%", _FINETUNE, "as good"),
            *_make_findings("three quarters serve the linear probe better than half", "75%", "50%", _LINEAR),
        ),
        source="figure 5",
        axis="patches hidden, %",
    )


SCHEDULE = Table(
    "Schedule length",
    (
        Arm("1/8", length=1 / 8, x=1 / 8, paper=_paper_accuracies(82.3, 57.3)),
        Arm("1/4", length=1 / 4, x=1 / 4, paper=_paper_accuracies(83.3, 64.4)),
        Arm("1/2", length=1 / 2, x=1 / 2, paper=_paper_accuracies(84.3, 69.7)),
        Arm("1", x=1.0, paper=_paper_accuracies(84.9, 73.5)),
    ),
    (
        *_make_findings("longer is better", "1", "1/4", _FINETUNE, _LINEAR),
        *_make_findings("twice as long still helps", "1", "1/2", _FINETUNE, _LINEAR),
    ),
    source="figure 7, 100 to 800 epochs",
    axis="length of the schedule",
)
PARTIAL_FINETUNING = Table(
    "Partial fine-tuning",
    (
        Arm(
            "MAE",
            paper={
                f"finetune:{b}" if b != "all" else _FINETUNE: mae
                for b, (mae, _) in _BLOCK_ACCURACIES.items()
                if mae
            },
        ),
        Arm(
            "MoCo v3",
            {"method": "mocov3"},
            paper={
                f"finetune:{b}" if b != "all" else _FINETUNE: moco
                for b, (_, moco) in _BLOCK_ACCURACIES.items()
                if moco
            },
        ),
    ),
    (
        Finding("MoCo v3 is ahead with a frozen encoder", "MoCo v3", "MAE", "finetune:0"),
        Finding("MAE is ahead once a block is tuned", "MAE", "MoCo v3", "finetune:1"),
        Finding("MAE is ahead with four blocks tuned", "MAE", "MoCo v3", "finetune:4"),
        Finding("MAE is ahead with all blocks tuned", "MAE", "MoCo v3", _FINETUNE),
        Finding("one tuned block helps", "MAE", "MAE", "finetune:1", second_measure="finetune:0"),
        Finding(
            "four blocks do as well as all", "MAE", "MAE", "finetune:4", "as good", second_measure=_FINETUNE
        ),
        Finding(
            "one tuned block gains more for MAE",
            "MAE",
            "MoCo v3",
            "finetune:1",
            over=("MAE", "MoCo v3"),
            over_measure="finetune:0",
        ),
    ),
    measures=("finetune:0", "finetune:0.5", "finetune:1", "finetune:2", "finetune:4", _FINETUNE),
    source="figure 9",
)
BASELINES = Table(
    "Baselines",
    (
        Arm("random weights", start="random", paper=_paper_accuracies(82.6)),
        Arm("denoising", {"method": "denoising"}),
        Arm("SimCLR", {"method": "simclr"}),
        Arm("BYOL", {"method": "byol"}),
        Arm("MoCo v3", {"method": "mocov3"}, paper=_paper_accuracies(84.1, 77.6)),
        Arm("BEiT", {"method": "beit", "tokenizer": "study"}, paper=_paper_accuracies(85.2, 52.1)),
        Arm("MAE", {"norm_pix_loss": True}, paper=_paper_accuracies(85.9, 75.8)),
    ),
    (
        *_make_findings("MAE is ahead of random weights", "MAE", "random weights", _FINETUNE, _LINEAR),
        *_make_findings("MAE is ahead of BEiT", "MAE", "BEiT", _FINETUNE, _LINEAR),
        *_make_findings("BEiT is ahead of MoCo v3", "BEiT", "MoCo v3", _FINETUNE),
        *_make_findings(
            "MoCo v3 is ahead of random weights", "MoCo v3", "random weights", _FINETUNE, _LINEAR
        ),
        *_make_findings("MoCo v3 is ahead of MAE with a frozen encoder", "MoCo v3", "MAE", _LINEAR),
        *_make_findings("hiding patches is better than noise", "MAE", "denoising", _FINETUNE, _LINEAR),
        *(
            finding
            for name in ("denoising", "SimCLR", "BYOL", "BEiT")
            for finding in _make_findings(
                f"{name} is ahead of random weights", name, "random weights", _LINEAR
            )
        ),
    ),
    measures=(_FINETUNE, _LINEAR, "knn"),
    source="tables 3 and 12, figure 9",
)
CLASSICAL_FEATURES = Table(
    "What was there before networks",
    (
        Arm("pixels", start="pixels"),
        Arm("components of pixels", start="pca"),
        Arm("components of patches", start="pca_patches"),
        Arm("clusters of pixels", start="kmeans_pixels"),
        Arm("clusters of patches", start="kmeans"),
        Arm("random weights", start="random"),
        Arm("MAE", {"norm_pix_loss": True}),
    ),
    tuple(
        finding
        for name in (
            "pixels",
            *("components of pixels", "components of patches"),
            *("clusters of pixels", "clusters of patches"),
        )
        for finding in _make_findings(f"MAE is ahead of {name}", "MAE", name, _LINEAR)
    ),
    measures=(_LINEAR, "knn"),
)
_SIZES = ("tiny", "small", "base")
SCALING = Table(
    "Size of the model",
    tuple(
        arm
        for name in _SIZES
        for arm in (
            Arm(f"{name}, random weights", {"model": f"mae_vit_{name}_patch4"}, start="random"),
            Arm(f"{name}, MAE", {"model": f"mae_vit_{name}_patch4"}),
        )
    ),
    tuple(
        Finding(
            f"the gain of {larger} is larger than that of {smaller}",
            f"{larger}, MAE",
            f"{smaller}, MAE",
            _FINETUNE,
            over=(f"{larger}, random weights", f"{smaller}, random weights"),
        )
        for smaller, larger in (("tiny", "small"), ("small", "base"), ("tiny", "base"))
    ),
    measures=(_FINETUNE,),
    source="figure 8: the gain grows from 1.3 (ViT-B) to 3.3 (L) and 3.8 (H)",
)
_VISIBLE_PERCENTAGES = (10, 25, 50, 75)
VISIBLE_PATCHES = Table(
    "Patches that are visible when features are used",
    (Arm("random weights", start="random"), Arm("MAE")),
    tuple(
        finding
        for percentage in (25, 50)
        for finding in (
            Finding(
                f"the whole picture is better than {percentage}% of it",
                "MAE",
                "MAE",
                _LINEAR,
                second_measure=f"linear@{percentage}",
            ),
        )
    ),
    measures=(
        *(f"linear@{percentage}" for percentage in _VISIBLE_PERCENTAGES),
        _LINEAR,
        *(f"knn@{percentage}" for percentage in _VISIBLE_PERCENTAGES),
        "knn",
    ),
    source="section 3: trained on a quarter, used on the whole",
)
WALL_CLOCK = Table(
    "What a step costs",
    (
        Arm(
            "with mask tokens",
            {"encoder_mask_tokens": True, "decoder_depth": 8},
            paper=_paper_accuracies(84.2),
        ),
        Arm("without", {"decoder_depth": 8}, paper=_paper_accuracies(84.9)),
        Arm("without, 1 block", {"decoder_depth": 1}, paper=_paper_accuracies(84.8)),
    ),
    tuple(
        _make_findings("the encoder is better without mask tokens", "without", "with mask tokens", _FINETUNE)
    ),
    measures=(_FINETUNE,),
    source="table 2: 2.8 and 3.7 times as fast",
)
PIXELS_OR_TOKENS = Table(
    "Pixels and tokens",
    (
        Arm("pixels", {"norm_pix_loss": False}, paper=_paper_accuracies(85.1)),
        Arm("pixels, normalised", {"norm_pix_loss": True}, paper=_paper_accuracies(85.9)),
        Arm("tokens", _TOKEN_FLAGS, paper=_paper_accuracies(85.7)),
    ),
    (
        Finding("pixels do as well as tokens", "pixels, normalised", "tokens", _FINETUNE, "as good"),
        *_make_findings(
            "normalised pixels are better than plain ones", "pixels, normalised", "pixels", _FINETUNE
        ),
    ),
    source="table 7",
)
NO_DECODER = Table(
    "A decoder, or none",
    (
        Arm(
            "none, mask tokens in the encoder",
            {"encoder_mask_tokens": True, "decoder_depth": 0},
        ),
        Arm("the paper's"),
    ),
    tuple(
        _make_findings(
            "a decoder is better than none",
            "the paper's",
            "none, mask tokens in the encoder",
            _FINETUNE,
            _LINEAR,
        )
    ),
    source="section 3, as BERT and BEiT do without",
)
LATER_METHODS = Table(
    "Later ideas",
    (
        Arm("the paper's"),
        Arm("uniform features (U-MAE)", {"uniformity": 0.01}),
        Arm("squares of 2 × 2 patches hidden", {"mask_unit": 2}),
        Arm("4 cls tokens, squares of 2 × 2 hidden", {"cls_tokens": 4, "mask_unit": 2}),
        Arm("fused blocks (MFF)", {"fused_blocks": "study"}),
        Arm("cross decoder (CrossMAE)", {"decoder": "cross", "predict_ratio": 1 / 3}),
        Arm("oriented gradients (HOG)", {"target": "hog"}),
    ),
    (
        *_make_findings(
            "uniform features serve the linear probe", "uniform features (U-MAE)", "the paper's", _LINEAR
        ),
        *_make_findings(
            "squares serve the linear probe", "squares of 2 × 2 patches hidden", "the paper's", _LINEAR
        ),
        *_make_findings(
            "cls tokens and squares serve the linear probe",
            "4 cls tokens, squares of 2 × 2 hidden",
            "the paper's",
            _LINEAR,
        ),
        *_make_findings("fused blocks serve the linear probe", "fused blocks (MFF)", "the paper's", _LINEAR),
        Finding(
            "the cross decoder is as good", "cross decoder (CrossMAE)", "the paper's", _FINETUNE, "as good"
        ),
        *_make_findings(
            "HOG is ahead of pixels (MaskFeat)", "oriented gradients (HOG)", "the paper's", _FINETUNE, _LINEAR
        ),
    ),
)

ROBUSTNESS = Table(
    "Robustness to corruptions",
    (
        Arm("random weights", start="random", paper=_paper_accuracies(82.6)),
        Arm("MoCo v3", {"method": "mocov3"}, paper=_paper_accuracies(84.1)),
        Arm("MAE", {"norm_pix_loss": True}, paper=_paper_accuracies(85.9)),
    ),
    tuple(_make_findings("MAE is ahead of random weights", "MAE", "random weights", _FINETUNE, "corrupted")),
    measures=(_FINETUNE, "corrupted"),
    source="table 13: mCE of MAE and from scratch, lower is better, 41.8 and 42.3 (ViT-L), 33.8 and 41.3 "
    "(H), but 51.7 and 45.8 (B)",
)

_ABLATION_BASE = {"norm_pix_loss": False}
"""Flags of the ablations of the paper, which predict pixels without normalization."""

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "table1",
            "Which parts of the method matter?",
            (make_depth_table(), make_width_table(), MASK_TOKENS, TARGETS, AUGMENTATION, MASK_SAMPLING),
            _ABLATION_BASE,
        ),
        Study("mask-ratio", "How much should be hidden?", (make_ratio_table(),), _ABLATION_BASE),
        Study("schedule", "How long should it be trained?", (SCHEDULE,), _ABLATION_BASE),
        Study("partial", "How much of the encoder has to be tuned?", (PARTIAL_FINETUNING,), _ABLATION_BASE),
        Study("baselines", "Is it better than what was there before?", (BASELINES, CLASSICAL_FEATURES)),
        Study("scaling", "Do gains grow with the model?", (SCALING,)),
        Study("visible", "Do features of a quarter serve the whole picture?", (VISIBLE_PATCHES,)),
        Study("wall-clock", "What do mask tokens cost?", (WALL_CLOCK,), _ABLATION_BASE),
        Study("tokens", "Does it take tokens?", (PIXELS_OR_TOKENS,)),
        Study("later", "Do later ideas help on small sets?", (LATER_METHODS,)),
        Study(
            "decoder",
            "What decoder does it take?",
            (make_depth_table(), make_width_table(), NO_DECODER),
            _ABLATION_BASE,
        ),
        Study("targets", "What should be predicted?", (TARGETS,), _ABLATION_BASE),
        Study(
            "augmentation",
            "What should be done to the pictures?",
            (AUGMENTATION, CONTRASTIVE_AUGMENTATION),
            _ABLATION_BASE,
        ),
        Study("robustness", "Does it withstand bad pictures?", (ROBUSTNESS,)),
        Study("sampling", "Which patches should be hidden?", (MASK_SAMPLING,), _ABLATION_BASE),
    )
}
"""The built-in studies by name."""
