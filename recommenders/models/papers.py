"""Where each recommender was published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """What is needed to find it."""

    authors: str
    """In short: "Rendle et al."; two names where there are two."""
    title: str
    venue: str
    """Conference or journal by its usual abbreviation."""
    year: int

    @property
    def short(self) -> str:
        """Return the one-line reference: "Rendle et al., UAI 2009"."""
        return f"{self.authors}, {self.venue} {self.year}"


PAPERS: dict[str, Paper] = {
    "itemknn": Paper("Deshpande and Karypis", "Item-based top-N recommendation algorithms", "TOIS", 2004),
    "itemknn_content": Paper("Ferrari Dacrema et al.", "Are we really making much progress?", "RecSys", 2019),
    "ease": Paper("Steck", "Embarrassingly shallow autoencoders for sparse data", "WWW", 2019),
    "bpr": Paper("Rendle et al.", "BPR: Bayesian personalized ranking from implicit feedback", "UAI", 2009),
    "lightgcn": Paper(
        "He et al.",
        "LightGCN: Simplifying and powering graph convolution network for recommendation",
        "SIGIR",
        2020,
    ),
    "layergcn": Paper(
        "Zhou et al.", "Layer-refined graph convolutional networks for recommendation", "ICDE", 2023
    ),
    "selfcf": Paper(
        "Zhou et al.",
        "SelfCF: A simple framework for self-supervised collaborative filtering",
        "TORS",
        2023,
    ),
    "vbpr": Paper(
        "He and McAuley",
        "VBPR: Visual Bayesian personalized ranking from implicit feedback",
        "AAAI",
        2016,
    ),
    "mmgcn": Paper(
        "Wei et al.",
        "MMGCN: Multi-modal graph convolution network for personalized recommendation of micro-video",
        "MM",
        2019,
    ),
    "grcn": Paper(
        "Wei et al.",
        "Graph-refined convolutional network for multimedia recommendation with implicit feedback",
        "MM",
        2020,
    ),
    "lattice": Paper("Zhang et al.", "Mining latent structures for multimedia recommendation", "MM", 2021),
    "dualgnn": Paper(
        "Wang et al.", "DualGNN: Dual graph neural network for multimedia recommendation", "TMM", 2021
    ),
    "mmgcl": Paper(
        "Yi et al.",
        "Multi-modal graph contrastive learning for micro-video recommendation",
        "SIGIR",
        2022,
    ),
    "slmrec": Paper("Tao et al.", "Self-supervised learning for multimedia recommendation", "TMM", 2022),
    "freedom": Paper(
        "Zhou and Shen",
        "A tale of two graphs: Freezing and denoising graph structures for multimodal recommendation",
        "MM",
        2023,
    ),
    "bm3": Paper(
        "Zhou et al.", "Bootstrap latent representations for multi-modal recommendation", "WWW", 2023
    ),
    "mgcn": Paper(
        "Yu et al.", "Multi-view graph convolutional network for multimedia recommendation", "MM", 2023
    ),
    "dragon": Paper(
        "Zhou et al.",
        "Enhancing dyadic relations with homogeneous graphs for multimodal recommendation",
        "ECAI",
        2023,
    ),
    "lgmrec": Paper(
        "Guo et al.",
        "LGMRec: Local and global graph learning for multimodal recommendation",
        "AAAI",
        2024,
    ),
    "smore": Paper(
        "Ong and Khong",
        "Spectrum-based modality representation fusion graph convolutional network for multimodal "
        "recommendation",
        "WSDM",
        2025,
    ),
    "pgl": Paper(
        "Yu et al.",
        "Mind individual information! Principal graph learning for multimedia recommendation",
        "AAAI",
        2025,
    ),
    "mvgae": Paper(
        "Yi and Chen", "Multi-modal variational graph auto-encoder for recommendation systems", "TMM", 2021
    ),
    "damrs": Paper(
        "Xv et al.",
        "Improving multi-modal recommender systems by denoising and aligning multi-modal content and user "
        "feedback",
        "KDD",
        2024,
    ),
    "mmgcf": Paper(
        "Spillo et al.",
        "Multimodal graph collaborative filtering for recommendation with graph convolutional networks",
        "UMAP",
        2026,
    ),
}
"""By the recommender's name; popularity and random come from no paper."""
