"""The terms of the report in a sentence or two: tooltips of headings, and a list at the end."""

GLOSSARY = {
    "Accuracy": "Share of test images whose class is predicted correctly; the mean over seeds.",
    "95 % interval": (
        "Where the figure would lie, in 95 of 100 repetitions of the experiment, with other seeds "
        "and other test images of the same kind."
    ),
    "Group": (
        "Models that share a letter cannot be told apart: the difference between them is within "
        "what other seeds or other test images could turn round."
    ),
    "Rank": "By the score on validation images, which also chose the weights. Ties share a rank.",
    "Seed": (
        "One repetition of training with other random numbers: initial weights, order of batches, "
        "augmentation, dropout. The split into parts stays the same."
    ),
    "Multiply-adds": (
        "Multiplications, each with an addition, in the convolutions and matrix products of one "
        "forward pass over one image. A FLOP count is about twice as large."
    ),
    "Parameters": "Trained or stored weights of the network. Nearest neighbours have none.",
    "Latency": "Time to predict one image, compiled and warm, on the device named above.",
    "Throughput": "Images predicted in a second, in large batches.",
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
        "Accuracy on corrupted copies of test images: noise, blur, colour, compression, geometry; "
        "the mean over kinds and severities."
    ),
    "Kept": "Accuracy under corruption as a share of the accuracy on the clean images.",
    "Corruption errors": (
        "All errors under corruption, divided by those of the baseline model; lower is better."
    ),
    "FGSM, PGD": (
        "Attacks that change each pixel a little so as to fool the model; accuracy under them is "
        "an upper bound of what a stronger attack would leave."
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
        "The interval of the difference, which covers all pairs of models at once, leaves out 0."
    ),
    "Pareto front": "Models for which no other is both cheaper and more accurate.",
    "Confusion": "Test images by true class (rows) and predicted class (columns); mean over seeds.",
    "Fingerprint": "Hash of all images, labels and parts: the same data have the same fingerprint.",
}

# Words in headings of tables, and the term that explains them; the first that is found counts.
_MENTIONS = (
    ("ece", "ECE"), ("nll", "NLL"), ("brier", "Brier"), ("kappa", "Kappa"),
    ("established", "Established"), ("fgsm", "FGSM, PGD"),
    ("pgd", "FGSM, PGD"), ("balanced", "Balanced accuracy"), ("auroc", "AUROC"),
    ("average precision", "Average precision"), ("temperature", "Temperature"),
    ("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"), ("support", "Support"),
    ("95 %", "95 % interval"), ("multiply", "Multiply-adds"), ("flops", "Multiply-adds"),
    ("params", "Parameters"), ("parameters", "Parameters"), ("group", "Group"), ("seeds", "Seed"),
    ("latency", "Latency"), ("predict images/s", "Throughput"), ("rank", "Rank"),
    ("corrupted", "Robustness"), ("kept", "Kept"), ("errors, %", "Corruption errors"),
    ("acc", "Accuracy"),
)  # fmt: skip


def term_of(heading: str) -> str:
    """Returns the term of the glossary that explains the heading of a column, "" for none."""
    words = heading.lower()
    return next((term for word, term in _MENTIONS if word in words), "")
