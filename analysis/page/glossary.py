"""The terms of the report in a sentence or two: tooltips of headings, and a list at the end."""

GLOSSARY = {
    "Accuracy": "Share of test images whose class is predicted correctly; the mean over seeds.",
    "95 % interval": (
        "In 95 of 100 such experiments, each with its own seeds and test images of the same kind, "
        "the interval holds the true figure. After cross-validation it is over folds: the "
        "corrected resampled t interval (Nadeau and Bengio 2003)."
    ),
    "Group": (
        "Models that share a letter cannot be told apart: other seeds or other test images might "
        "reverse the difference between them."
    ),
    "Rank": "By the score on validation images, which also chose the weights. Ties share a rank.",
    "Seed": (
        "One training run with its own random numbers: initial weights, order of batches, "
        "augmentation, dropout. Validation and test parts stay the same, and so do "
        "training images, unless a part of them is drawn (data.train_fraction)."
    ),
    "Multiply-adds": (
        "Multiplications, each with an addition, in the convolutions and matrix products of one "
        "forward pass over one image. A FLOP count is about twice as large."
    ),
    "Parameters": "Weights of the network, trained or frozen. Nearest neighbours have none.",
    "Latency": "Time to predict one image, compiled and warm, on the device named above.",
    "Throughput": "Images predicted per second, in large batches.",
    "Calibration": (
        "Whether confidence means what it says: of the predictions made with 80 % confidence, 80 % "
        "should be right."
    ),
    "ECE": (
        "Expected calibration error: mean gap between confidence and accuracy, in 15 bins of "
        "confidence, in percent. With few images even a perfect model is above 0."
    ),
    "NLL": "Negative log-likelihood of the true class in nats: the loss that training minimises.",
    "Brier": "Squared distance between predicted probabilities and the truth, 0 (best) to 2.",
    "Temperature": (
        "Number that divides the logits, fitted on validation images: above 1 the model was "
        "overconfident, below 1 underconfident."
    ),
    "Robustness": (
        "Mean accuracy on test images with noise, blur, other colours, compression and geometric "
        "changes, over kinds and severities."
    ),
    "Kept": "Accuracy under corruption as a share of the accuracy on the clean images.",
    "Corruption errors": (
        "All errors under corruption, divided by those of a baseline model; lower is better."
    ),
    "FGSM, PGD": (
        "Attacks that change each pixel slightly to fool the model. Accuracy under them is an "
        "upper bound: a stronger attack may leave less."
    ),
    "Precision": "Share of the predictions of a class that are right.",
    "Recall": "Share of the images of a class that are found.",
    "F1": "Harmonic mean of precision and recall; for a model, the mean over classes.",
    "Balanced accuracy": "Mean recall over classes: each class counts the same, however rare.",
    "Support": "Number of test images of a class.",
    "AUROC": (
        "Area under the ROC curve: how often an image of the class gets a higher score than one of "
        "another class; 50 % is chance."
    ),
    "Average precision": "Area under the precision-recall curve; chance is the share of the class.",
    "Kappa": "Agreement of two models beyond what chance alone would give; 1 is perfect.",
    "Established": (
        "The 95 % interval of the difference, corrected for all pairs of models, leaves out 0."
    ),
    "Probability better": (
        "How probable it is that the first model is truly better than the second, if any "
        "difference was as probable as any other before: too sure where models are much alike. "
        "“By margin”: by more than config.compare.margin. Not corrected for the number of pairs."
    ),
    "Needed": (
        "Seeds per model, or test images, that would establish the observed difference with a "
        "probability of 80 %; ∞: over 100 seeds, or 100 times the images."
    ),
    "Verdict": (
        "Overfits: the validation loss rose again, or training accuracy ends far above validation "
        "accuracy. Still improving: the validation loss fell to the end, so more epochs may help. "
        "Stopped improving: neither."
    ),
    "Pareto front": "Models for which no other is both cheaper and more accurate.",
    "Confusion": "Test images by true class (rows) and predicted class (columns); mean over seeds.",
    "Fingerprint": "Hash of all images, labels and splits; equal data have equal fingerprints.",
}

# Words in headings of tables, and the term that explains them; the first that is found counts.
_MENTIONS = (
    ("ece", "ECE"), ("nll", "NLL"), ("brier", "Brier"), ("kappa", "Kappa"),
    ("established", "Established"), ("p(", "Probability better"), ("needed", "Needed"),
    ("verdict", "Verdict"), ("fgsm", "FGSM, PGD"),
    ("pgd", "FGSM, PGD"), ("balanced", "Balanced accuracy"), ("auroc", "AUROC"),
    ("average precision", "Average precision"), ("temperature", "Temperature"),
    ("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"), ("support", "Support"),
    ("95 %", "95 % interval"), ("multiply", "Multiply-adds"), ("flops", "Multiply-adds"),
    ("params", "Parameters"), ("parameters", "Parameters"), ("group", "Group"), ("seeds", "Seed"),
    ("latency", "Latency"), ("training images", ""), ("images/s", "Throughput"), ("rank", "Rank"),
    ("corrupted", "Robustness"), ("kept", "Kept"), ("errors, %", "Corruption errors"),
    ("acc", "Accuracy"),
)  # fmt: skip


def term_of(heading: str) -> str:
    """Returns the term of the glossary that explains the heading of a column, "" for none."""
    words = heading.lower()
    return next((term for word, term in _MENTIONS if word in words), "")
