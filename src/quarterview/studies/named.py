"""The paper's studies, as tables of differences, with its own figures beside them.

All figures are of He et al. 2021 (arXiv 2111.06377): ViT-L/16 on ImageNet, 800 epochs, top-1 in percent.
Arms are those of the paper as far as a small model has them; its decoder of 512 × 8 is for an encoder that
is five times as wide.
"""

from collections.abc import Mapping, Sequence

from quarterview.studies.study import Arm, Finding, Study, Table

_FT, _LIN = "finetune", "linear"
_TOKENS = {"target": "tokens", "tokenizer": "study"}
"""Visual tokens of a tokenizer that the study trains first."""


def _paper(finetune: float | None = None, linear: float | None = None) -> dict[str, float]:
    return {k: v for k, v in ((_FT, finetune), (_LIN, linear)) if v is not None}


def _ahead(claim: str, first: str, second: str, *measures: str) -> list[Finding]:
    return [Finding(claim, first, second, measure) for measure in measures]


DEPTHS: Mapping[int, tuple[float, float]] = {
    **{1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}
}
WIDTHS: Mapping[int, tuple[float, float]] = {
    **{128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)}
}
"""Of a decoder for an encoder of width 1024."""
RATIOS: Mapping[int, tuple[float, float]] = {
    **{10: (83.2, 54.6), 20: (83.4, 58.9), 30: (83.4, 61.7), 40: (84.7, 67.0), 50: (84.9, 69.9)},
    **{60: (85.0, 71.8), 70: (84.9, 73.2), 75: (84.9, 73.5), 80: (84.5, 71.8), 90: (83.0, 66.1)},
}
BLOCKS: Mapping[str, tuple[float | None, float | None]] = {
    **{"0": (73.5, 77.6), "0.5": (79.1, None), "1": (81.0, 79.9), "2": (83.1, 80.8), "4": (84.2, 81.6)},
    **{"6": (84.4, 81.9), "all": (84.9, 84.1)},
}
"""Of figure 9: MAE, MoCo v3."""


def depth_table(depths: Sequence[int] = (1, 2, 4, 8)) -> Table:
    """Table 1a."""
    return Table(
        "Decoder depth",
        tuple(
            Arm(f"{n} block{'s' * (n > 1)}", {"decoder_depth": n}, x=n, paper=_paper(*DEPTHS[n]))
            for n in depths
        ),
        (
            Finding("a one-block decoder suffices for fine-tuning", "1 block", "8 blocks", _FT, "as good"),
            *_ahead("a deep decoder serves the linear probe", "8 blocks", "1 block", _LIN),
        ),
        source="table 1a",
        axis="blocks of the decoder",
    )


def width_table(shares: Sequence[int] = (8, 4, 2, 1)) -> Table:
    """Table 1b: widths as the encoder's divided by these."""
    return Table(
        "Decoder width",
        tuple(
            Arm(
                f"1/{n} of the encoder's" if n > 1 else "the encoder's",
                x=1 / n,
                decoder_share=1 / n,
                paper=_paper(*WIDTHS[1024 // n]),
            )
            for n in shares
        ),
        (
            Finding(
                "a narrow decoder suffices for fine-tuning",
                "1/8 of the encoder's",
                "1/2 of the encoder's",
                _FT,
                "as good",
            ),
            *_ahead(
                "a wide decoder serves the linear probe",
                "1/2 of the encoder's",
                "1/8 of the encoder's",
                _LIN,
            ),
        ),
        source="table 1b",
        axis="width of the decoder, as a share of the encoder's",
    )


MASK_TOKENS = Table(
    "Mask tokens in the encoder",
    (
        Arm("with mask tokens", {"encoder_mask_tokens": True}, paper=_paper(84.2, 59.6)),
        Arm("without", paper=_paper(84.9, 73.5)),
    ),
    tuple(_ahead("the encoder is better without mask tokens", "without", "with mask tokens", _FT, _LIN)),
    source="table 1c",
)
TARGETS = Table(
    "Target",
    (
        Arm("pixels", paper=_paper(84.9, 73.5)),
        Arm("pixels, normalised", {"norm_pix_loss": True}, paper=_paper(85.4, 73.9)),
        Arm("principal components", {"target": "pca"}, paper=_paper(84.6, 72.3)),
        Arm("tokens", _TOKENS, paper=_paper(85.3, 71.6)),
    ),
    (
        *_ahead("normalising the pixels helps", "pixels, normalised", "pixels", _FT, _LIN),
        Finding("pixels do as well as tokens", "pixels, normalised", "tokens", _FT, "as good"),
        *_ahead("components are worse than pixels", "pixels", "principal components", _FT, _LIN),
    ),
    source="table 1d",
)
AUGMENTATION = Table(
    "Augmentation",
    (
        Arm("none", {"crop": "none"}, paper=_paper(84.0, 65.7)),
        Arm("crop, fixed size", {"crop": "fixed"}, paper=_paper(84.7, 73.1)),
        Arm("crop, random size", paper=_paper(84.9, 73.5)),
        Arm("crop and colour jitter", {"color_jitter": 0.4}, paper=_paper(84.3, 71.9)),
    ),
    (
        Finding("augmentation matters little", "none", "crop, random size", _FT, "as good"),
        *_ahead("colour jitter harms", "crop, random size", "crop and colour jitter", _FT, _LIN),
        *_ahead("a crop serves the linear probe", "crop, random size", "none", _LIN),
    ),
    source="table 1e",
)
_NEEDY = tuple(
    arm
    for name, method in (("SimCLR", "simclr"), ("BYOL", "byol"))
    for arm in (
        Arm(name, {"method": method}),
        Arm(f"{name}, crop only", {"method": method, "view_colours": False}),
    )
)
NEEDY = Table(
    "Augmentation where views are compared",
    _NEEDY,
    tuple(
        finding
        for name in ("SimCLR", "BYOL")
        for finding in _ahead(f"{name} needs more than a crop", name, f"{name}, crop only", _LIN)
    ),
    measures=(_LIN, "knn"),
    source="section 4.1: with a crop alone BYOL loses 13 points and SimCLR 28",
)
SAMPLING = Table(
    "Mask sampling",
    (
        Arm("random 75%", paper=_paper(84.9, 73.5)),
        Arm("block 50%", {"mask": "block", "mask_ratio": 0.5}, paper=_paper(83.9, 72.3)),
        Arm("block 75%", {"mask": "block"}, paper=_paper(82.8, 63.9)),
        Arm("grid 75%", {"mask": "grid"}, paper=_paper(84.0, 66.0)),
    ),
    (
        *_ahead("random masks are better than blocks", "random 75%", "block 75%", _FT, _LIN),
        *_ahead("random masks are better than a grid", "random 75%", "grid 75%", _FT, _LIN),
        *_ahead("blocks are better at half than at three quarters", "block 50%", "block 75%", _FT, _LIN),
    ),
    source="table 1f",
)


def ratio_table(ratios: Sequence[int] = (10, 25, 50, 75, 90)) -> Table:
    """Figure 5."""
    return Table(
        "Mask ratio",
        tuple(
            Arm(f"{n}%", {"mask_ratio": n / 100}, x=n, paper=_paper(*RATIOS[n]) if n in RATIOS else {})
            for n in ratios
        ),
        (
            *_ahead("a high ratio is better than a low one", "75%", "10%", _FT, _LIN),
            *_ahead("hiding almost all is too much", "75%", "90%", _FT, _LIN),
            Finding("half and three quarters serve fine-tuning alike", "75%", "50%", _FT, "as good"),
            *_ahead("three quarters serve the linear probe better than half", "75%", "50%", _LIN),
        ),
        source="figure 5",
        axis="patches hidden, %",
    )


SCHEDULE = Table(
    "Schedule length",
    (
        Arm("1/8", length=1 / 8, x=1 / 8, paper=_paper(82.3, 57.3)),
        Arm("1/4", length=1 / 4, x=1 / 4, paper=_paper(83.3, 64.4)),
        Arm("1/2", length=1 / 2, x=1 / 2, paper=_paper(84.3, 69.7)),
        Arm("1", x=1.0, paper=_paper(84.9, 73.5)),
    ),
    (
        *_ahead("longer is better", "1", "1/4", _FT, _LIN),
        *_ahead("twice as long still helps", "1", "1/2", _FT, _LIN),
    ),
    source="figure 7, 100 to 800 epochs",
    axis="length of the schedule",
)
PARTIAL = Table(
    "Partial fine-tuning",
    (
        Arm(
            "MAE",
            paper={f"finetune:{b}" if b != "all" else _FT: mae for b, (mae, _) in BLOCKS.items() if mae},
        ),
        Arm(
            "MoCo v3",
            {"method": "mocov3"},
            paper={f"finetune:{b}" if b != "all" else _FT: moco for b, (_, moco) in BLOCKS.items() if moco},
        ),
    ),
    (
        Finding("MoCo v3 is ahead with a frozen encoder", "MoCo v3", "MAE", "finetune:0"),
        Finding("MAE is ahead once a block is tuned", "MAE", "MoCo v3", "finetune:1"),
        Finding("MAE is ahead with four blocks tuned", "MAE", "MoCo v3", "finetune:4"),
        Finding("MAE is ahead with all blocks tuned", "MAE", "MoCo v3", _FT),
        Finding("one tuned block helps", "MAE", "MAE", "finetune:1", second_measure="finetune:0"),
        Finding("four blocks do as well as all", "MAE", "MAE", "finetune:4", "as good", second_measure=_FT),
        Finding(
            "one tuned block gains more for MAE",
            "MAE",
            "MoCo v3",
            "finetune:1",
            over=("MAE", "MoCo v3"),
            over_measure="finetune:0",
        ),
    ),
    measures=("finetune:0", "finetune:0.5", "finetune:1", "finetune:2", "finetune:4", _FT),
    source="figure 9",
)
BASELINES = Table(
    "Baselines",
    (
        Arm("random weights", start="random", paper=_paper(82.6)),
        Arm("denoising", {"method": "denoising"}),
        Arm("SimCLR", {"method": "simclr"}),
        Arm("BYOL", {"method": "byol"}),
        Arm("MoCo v3", {"method": "mocov3"}, paper=_paper(84.1, 77.6)),
        Arm("BEiT", {"method": "beit", "tokenizer": "study"}, paper=_paper(85.2, 52.1)),
        Arm("MAE", {"norm_pix_loss": True}, paper=_paper(85.9, 75.8)),
    ),
    (
        *_ahead("MAE is ahead of random weights", "MAE", "random weights", _FT, _LIN),
        *_ahead("MAE is ahead of BEiT", "MAE", "BEiT", _FT, _LIN),
        *_ahead("BEiT is ahead of MoCo v3", "BEiT", "MoCo v3", _FT),
        *_ahead("MoCo v3 is ahead of random weights", "MoCo v3", "random weights", _FT, _LIN),
        *_ahead("MoCo v3 is ahead of MAE with a frozen encoder", "MoCo v3", "MAE", _LIN),
        *_ahead("hiding patches is better than noise", "MAE", "denoising", _FT, _LIN),
        *(
            finding
            for name in ("denoising", "SimCLR", "BYOL", "BEiT")
            for finding in _ahead(f"{name} is ahead of random weights", name, "random weights", _LIN)
        ),
    ),
    measures=(_FT, _LIN, "knn"),
    source="tables 3 and 12, figure 9",
)
PLAIN = Table(
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
        for finding in _ahead(f"MAE is ahead of {name}", "MAE", name, _LIN)
    ),
    measures=(_LIN, "knn"),
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
            _FT,
            over=(f"{larger}, random weights", f"{smaller}, random weights"),
        )
        for smaller, larger in (("tiny", "small"), ("small", "base"), ("tiny", "base"))
    ),
    measures=(_FT,),
    source="figure 8: the gain grows from 1.3 (ViT-B) to 3.3 (L) and 3.8 (H)",
)
_VISIBLE = (10, 25, 50, 75)
VISIBLE = Table(
    "Patches that are visible when features are used",
    (Arm("random weights", start="random"), Arm("MAE")),
    tuple(
        finding
        for share in (25, 50)
        for finding in (
            Finding(
                f"the whole picture is better than {share}% of it",
                "MAE",
                "MAE",
                _LIN,
                second_measure=f"linear@{share}",
            ),
        )
    ),
    measures=(
        *(f"linear@{share}" for share in _VISIBLE),
        _LIN,
        *(f"knn@{share}" for share in _VISIBLE),
        "knn",
    ),
    source="section 3: trained on a quarter, used on the whole",
)
WALL_CLOCK = Table(
    "What a step costs",
    (
        Arm("with mask tokens", {"encoder_mask_tokens": True, "decoder_depth": 8}, paper=_paper(84.2)),
        Arm("without", {"decoder_depth": 8}, paper=_paper(84.9)),
        Arm("without, 1 block", {"decoder_depth": 1}, paper=_paper(84.8)),
    ),
    tuple(_ahead("the encoder is better without mask tokens", "without", "with mask tokens", _FT)),
    measures=(_FT,),
    source="table 2: 2.8 and 3.7 times as fast",
)
TOKENS = Table(
    "Pixels and tokens",
    (
        Arm("pixels", {"norm_pix_loss": False}, paper=_paper(85.1)),
        Arm("pixels, normalised", {"norm_pix_loss": True}, paper=_paper(85.9)),
        Arm("tokens", _TOKENS, paper=_paper(85.7)),
    ),
    (
        Finding("pixels do as well as tokens", "pixels, normalised", "tokens", _FT, "as good"),
        *_ahead("normalised pixels are better than plain ones", "pixels, normalised", "pixels", _FT),
    ),
    source="table 7",
)
BERT = Table(
    "A decoder, or none",
    (
        Arm(
            "none, mask tokens in the encoder",
            {"encoder_mask_tokens": True, "decoder_depth": 0},
        ),
        Arm("the paper's"),
    ),
    tuple(
        _ahead("a decoder is better than none", "the paper's", "none, mask tokens in the encoder", _FT, _LIN)
    ),
    source="section 3, as BERT and BEiT do without",
)
LATER = Table(
    "Later ideas",
    (
        Arm("the paper's"),
        Arm("uniform features (U-MAE)", {"uniformity": 0.01}),
        Arm("squares of 2 × 2 patches hidden", {"mask_unit": 2}),
        Arm("4 cls tokens, squares of 2 × 2 hidden", {"cls_tokens": 4, "mask_unit": 2}),
        Arm("fused blocks (MFF)", {"fused_blocks": "study"}),
        Arm("cross decoder (CrossMAE)", {"decoder": "cross", "predict_share": 1 / 3}),
        Arm("oriented gradients (HOG)", {"target": "hog"}),
    ),
    (
        *_ahead("uniform features serve the linear probe", "uniform features (U-MAE)", "the paper's", _LIN),
        *_ahead("squares serve the linear probe", "squares of 2 × 2 patches hidden", "the paper's", _LIN),
        *_ahead(
            "cls tokens and squares serve the linear probe",
            "4 cls tokens, squares of 2 × 2 hidden",
            "the paper's",
            _LIN,
        ),
        *_ahead("fused blocks serve the linear probe", "fused blocks (MFF)", "the paper's", _LIN),
        Finding("the cross decoder is as good", "cross decoder (CrossMAE)", "the paper's", _FT, "as good"),
        *_ahead("HOG is ahead of pixels (MaskFeat)", "oriented gradients (HOG)", "the paper's", _FT, _LIN),
    ),
)

ROBUSTNESS = Table(
    "Robustness to corruptions",
    (
        Arm("random weights", start="random", paper=_paper(82.6)),
        Arm("MoCo v3", {"method": "mocov3"}, paper=_paper(84.1)),
        Arm("MAE", {"norm_pix_loss": True}, paper=_paper(85.9)),
    ),
    tuple(_ahead("MAE is ahead of random weights", "MAE", "random weights", _FT, "corrupted")),
    measures=(_FT, "corrupted"),
    source="table 13: mCE of MAE and from scratch, lower is better, 41.8 and 42.3 (ViT-L), 33.8 and 41.3 "
    "(H), but 51.7 and 45.8 (B)",
)

_ABLATED = {"norm_pix_loss": False}  # the paper's ablations predict plain pixels

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "table1",
            "Which parts of the method matter?",
            (depth_table(), width_table(), MASK_TOKENS, TARGETS, AUGMENTATION, SAMPLING),
            _ABLATED,
        ),
        Study("mask-ratio", "How much should be hidden?", (ratio_table(),), _ABLATED),
        Study("schedule", "How long should it be trained?", (SCHEDULE,), _ABLATED),
        Study("partial", "How much of the encoder has to be tuned?", (PARTIAL,), _ABLATED),
        Study("baselines", "Is it better than what was there before?", (BASELINES, PLAIN)),
        Study("scaling", "Do gains grow with the model?", (SCALING,)),
        Study("visible", "Do features of a quarter serve the whole picture?", (VISIBLE,)),
        Study("wall-clock", "What do mask tokens cost?", (WALL_CLOCK,), _ABLATED),
        Study("tokens", "Does it take tokens?", (TOKENS,)),
        Study("later", "Do later ideas help on small sets?", (LATER,)),
        Study("decoder", "What decoder does it take?", (depth_table(), width_table(), BERT), _ABLATED),
        Study("targets", "What should be predicted?", (TARGETS,), _ABLATED),
        Study("augmentation", "What should be done to the pictures?", (AUGMENTATION, NEEDY), _ABLATED),
        Study("robustness", "Does it withstand bad pictures?", (ROBUSTNESS,)),
        Study("sampling", "Which patches should be hidden?", (SAMPLING,), _ABLATED),
    )
}
"""By name."""
