"""Every field of an experiment, with its default and its meaning; other configs start from here.

This file trains nothing by itself. To see a config as it resolves, without training:

    python main.py --config=configs/digits.py --workdir=runs/digits --dry_run

An experiment is the grid models x variants x sweep x seeds. The config of one run is everything
below except those, `per_model` and `search`, changed in this order: the file's `per_model.<model>`,
then fields given on the command line, then `--config.per_model.<model>...`, then the variant, then
the sweep, then what a search chose. A run's phases change it further, one after the other; a field
given on the command line wins over the file's phases too, but for `--config.phase.<name>...`, which
sets one phase.

On the command line, `--config.per_model.<model>.` takes any field of a run, whether this file names
it there or not, and so does `--config.phase.<name>.`, of a phase that `config.phases` names; and
`--config.model.` a field of the architecture, where every model has it.

A run goes on, or is skipped as finished, only with the config and the data it began with. Free to
differ are what cannot change a result: all of `runtime` and `compare`, `eval_batch_size`, and where
the data lies (`data.source`, `data.path`, `data.tfds_dir`): they are known by their images, labels
and parts.
"""

from ml_collections import ConfigDict

from models import MODELS, fields_of

# Phase tune of networks with ten stages, of which the late ones are short. Chosen on validation
# images of the Intel scenes and of CIFAR-10 at 64 pixels, with efficientnet_lite0: see README.
SHORT_STAGES = {"train": "last:6", "epochs": 8, "optimizer": {"learning_rate": 1e-3}}


def get_config(models: str = "") -> ConfigDict:
    """Returns the default experiment; `models` is a comma-separated choice ("" for the small)."""
    config = ConfigDict()

    # --- the grid -------------------------------------------------------------------------------
    config.models = ("linear", "knn", "mlp", "cnn", "cnn_deep")
    config.seeds = (0, 1, 2)  # initialisation, batch order, augmentation, dropout; never the split
    # Further swept fields, e.g. "optimizer.learning_rate=0.001,0.01; augment.mixup=0,0.2". Commas
    # in brackets or quotes are part of a value: "data.split=(0.7,0.15,0.15),(0.8,0.1,0.1)". A field
    # of one model alone: "per_model.cnn.model.dropout=0,0.3".
    config.sweep = ""
    # Named changes to be compared, each as in `per_model`; see configs/ablation.py.
    config.variants = ConfigDict()

    # --- data -----------------------------------------------------------------------------------
    data = config.data = ConfigDict()
    # digits | folder | npz | tfds | array_record, files that `python -m analysis.records` makes of
    # any of the others. A run goes on with the same images from another source.
    data.source = "folder"
    data.path = ""  # the folder, the .npz file, or the tfds name (tfds_dir holds prepared data)
    data.tfds_dir = ""  # "" is the default of tensorflow-datasets
    # Of folders. class: path/<class>/<image> | part/class: path/train/<class>/<image> |
    # class/part: path/<class>/train/<image> | auto: as the folders' names show; in doubt it stops
    data.layout = "auto"
    # Fractions of train, validation, test, stratified. Parts that the source already has are kept:
    # with a test folder, (0.8, 0.2) divides the rest; three numbers then count in proportion.
    # Classes below 100 images are divided to the image, by largest remainder over the classes.
    data.split = (0.7, 0.15, 0.15)
    data.split_seed = 0
    # Train on this share of the training images; validation and test images stay. Stratified, and
    # drawn from the run's seed (`data.train_seed`, which the grid fills in): of one seed, a smaller
    # share is part of a larger one, and every class keeps an image. Sweep it to see what more
    # images would bring: --config.sweep="data.train_fraction=0.05,0.1,0.25,0.5,1". Epochs stay what
    # they are, so half the images are half the steps; to give each size the epochs that suit it
    # best, sweep these too ("...; epochs=20,80"): each then has a curve of its own.
    data.train_fraction = 1.0
    # Cross-validation in this many folds; 0: none. Each image is tested once, by the run of its
    # fold; the first two fractions of data.split divide the others into training and validation.
    # A test part of the source stays out, a validation part is that of every fold.
    data.folds = 0
    data.fold = 0  # of a run; the grid fills it
    # Images of one group stay in one part: a regular expression whose first group, searched in the
    # image's id (its path), is the key; or a .csv file with the columns id,group. In given parts
    # they stay where they are, and a group in two parts counts as a leak.
    data.groups = ""
    data.image_size = 64  # height and width in pixels
    # Random resized crops are taken from images of this size, for those of a small image would be
    # blurred; 0: from images of image_size. Evaluation does not depend on it.
    data.store_size = 0
    data.resize = "squash"  # squash: ignore the aspect ratio | crop: shorter side, then the centre
    data.interpolation = "bilinear"  # nearest | bilinear | bicubic | lanczos; always antialiased
    data.background = (255, 255, 255)  # RGB shown through transparent pixels
    # A larger JPEG is decoded at reduced size, if that is larger than image_size; other images of
    # more pixels count as unreadable, for decoding them could take all memory.
    data.max_pixels = 100_000_000
    data.unreadable = (
        "error"  # error: refuse to start | skip: leave broken files out, with a warning
    )
    # Leave out training and validation images that are also in a later part, whose group is, or
    # whose exact copies carry another label. Test images are never left out.
    data.exclude_leaks = False

    # --- model ----------------------------------------------------------------------------------
    config.model = ConfigDict()  # fields of the architecture; named below, model by model
    config.compute_dtype = "float32"  # float32 | bfloat16; parameters and logits stay float32
    # Pretrained: none | timm/resnet50.tv_in1k, package/efficientnet_lite0.in1k, ... (python -m
    # models.pretrained list) | timm:FILE, torchvision:FILE, keras:FILE, lukemelas:FILE,
    # archcompare:FILE | run:RUN_DIR
    config.weights = "none"
    # The pixels that the weights were trained on. The rest are mistakes, for ablations, or the cure
    # that the preflight names: unit | raw | unscaled | rescaled_twice | swapped
    config.preprocessing = "weights"
    # Photographs are shown to pretrained weights before training; where activations are not like
    # those of the weights' own training: warn | error | off
    config.preflight = "warn"

    # --- phases ---------------------------------------------------------------------------------
    # What trains, one phase after the other: sections of `config.phase`, separated by commas. Each
    # starts from the best weights so far. auto: "head,tune" with pretrained weights, else "all".
    config.phases = "auto"
    config.train = "all"  # head | last:N, N stages with the head | all
    config.layer_decay = 1.0  # factor of the learning rate from one stage to the one before it
    config.batch_norm = (
        "batch"  # of stages that train: batch | running (statistics stay as they are)
    )
    config.frozen_batch_norm = "running"  # of frozen stages; batch is a mistake, for ablations only
    # An image is augmented in this many ways, epoch by epoch in turn; 0: anew every time. Stages
    # that are frozen are computed once a view and stored (see `runtime.feature_cache_mb`). The
    # views are the same for every seed, so that seeds share them; with 0, seeds differ in them.
    config.augment_views = 0
    # In place of optimizer.learning_rate and optimizer.weight_decay: every pair of these is trained
    # at once, in each run, and the one that `select` prefers on validation images is kept. For a
    # run of one phase on stored features (phases=head, with weights); () tries nothing.
    config.try_learning_rates = ()
    config.try_weight_decays = ()

    # What differs from the fields of this file in each phase.
    phase = config.phase = ConfigDict()
    phase.all = ConfigDict({"train": "all"})
    phase.head = ConfigDict(
        {
            "train": "head",
            "epochs": 15,
            "early_stopping_patience": 4,
            "augment_views": 4,
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    phase.tune = ConfigDict(
        {
            "train": "last:3",
            "epochs": 15,
            "early_stopping_patience": 5,
            "batch_norm": "running",
            "layer_decay": 0.7,
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"warmup_epochs": 1.0},
        }
    )
    phase.full = ConfigDict(
        {
            "train": "all",
            "layer_decay": 0.8,
            "optimizer": {"learning_rate": 2e-4},
            "schedule": {"warmup_epochs": 1.0},
        }
    )

    # --- training -------------------------------------------------------------------------------
    config.epochs = 20
    config.batch_size = 64  # over all devices together
    config.eval_batch_size = 256

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "adamw"  # sgd | adam | adamw
    optimizer.learning_rate = 1e-3
    optimizer.momentum = 0.9  # sgd
    optimizer.nesterov = True  # sgd
    optimizer.b1 = 0.9  # adam, adamw
    optimizer.b2 = 0.999  # adam, adamw
    # Not applied to biases, norms, class tokens and positions. adamw: decoupled; adam and sgd:
    # added to the gradient.
    optimizer.weight_decay = 1e-4
    optimizer.l1 = 0.0  # weight of the sum of absolute kernel values, added to the loss
    optimizer.clip_norm = 0.0  # largest global gradient norm; 0 is off

    schedule = config.schedule = ConfigDict()
    schedule.name = "cosine"  # constant | step | cosine | plateau
    schedule.warmup_epochs = 0.0  # linear, from 0; may be a fraction; before any schedule
    schedule.end_factor = 0.0  # cosine: last rate as a fraction of the first
    schedule.step_epochs = (10, 15)  # step: epochs after which the rate is multiplied by `factor`
    schedule.factor = 0.1  # step, plateau
    schedule.patience = 3  # plateau: evaluations without improvement before the rate drops

    loss = config.loss = ConfigDict()
    loss.name = "cross_entropy"  # cross_entropy | hinge
    loss.label_smoothing = 0.0
    loss.class_weights = "none"  # none | balanced | one number per class: "1,2.5,1"

    # Distillation: a student learns from the answers of finished runs too, to the very images that
    # it sees, augmented and mixed alike. Its loss is (1 - weight) x the one above + weight x
    # temperature^2 x KL(teacher || student), both softened by the temperature (Hinton et al. 2015).
    # The defaults are those of Zagoruyko and Komodakis 2017, and of most who compared since.
    distill = config.distill = ConfigDict()
    # "": none | run:DIR | run:DIR,run:DIR, the mean of their probabilities. {seed} and {fold} in it
    # become those of the student: run:runs/W/cnn_deep/seed{seed} teaches each seed by another one.
    distill.teacher = ""
    distill.temperature = 4.0
    distill.weight = 0.9  # of the teacher; 1: labels do not count

    config.ema_decay = 0.0  # moving average of the weights, evaluated in their place; 0 is off
    config.eval_every_epochs = 1
    # What the best weights of all phases are chosen by, on validation images: loss (the negative
    # log-likelihood, whatever is trained with) | accuracy | balanced_accuracy | macro_f1
    config.select = "loss"
    config.early_stopping_patience = 0  # evaluations without a better one before the end; 0 is off

    config.predict_test = True  # False in the trials of a search, which never see test images

    # --- augmentation: training images only, on the device --------------------------------------
    augment = config.augment = ConfigDict()
    augment.flip_horizontal = False
    augment.flip_vertical = False
    augment.rotation = 0.0  # up to this many degrees either way
    augment.zoom = 0.0  # scale in [1 - zoom, 1 + zoom]
    augment.shift = 0.0  # up to this fraction of the side, each way
    augment.crop_area = (1.0, 1.0)  # random resized crop: fraction of the area; (1, 1) is off
    augment.crop_aspect = (0.75, 1.3333)  # its aspect ratio
    augment.brightness = 0.0  # factor in [1 - b, 1 + b]; likewise the next two
    augment.contrast = 0.0
    augment.saturation = 0.0
    augment.mixup = 0.0  # alpha of the Beta distribution; 0 is off
    augment.cutmix = 0.0

    # --- what differs from model to model -------------------------------------------------------
    per_model = config.per_model = ConfigDict()
    # Beside its architecture's own fields, in the section `model`, a model may differ in any field
    # above. The defaults are those of the architecture: see models/<name>.py.
    for name in MODELS:
        fields = {field: value for field, value in fields_of(name).items() if field != "form"}
        per_model[name] = ConfigDict({"model": fields})
        if name.startswith(("efficientnet", "mobilenet")):
            per_model[name].phase = ConfigDict({"tune": SHORT_STAGES})

    # --- a search for fields, with --tune=N: see experiment/search.py ----------------------------
    # Every model and variant gets the same number of trials, is judged by its validation loss, and
    # is trained anew with the winner's fields and `seeds`.
    search = config.search = ConfigDict()
    # Fields, each with the values "0,0.2", a range "0..0.5", or a logarithmic one "log:1e-4..1e-1".
    # "per_model.cnn.optimizer.learning_rate=log:1e-4..1e-2" takes the place of the field for one
    # model, and "phase.tune.optimizer.learning_rate=..." is of one phase, others are of all phases.
    search.space = "optimizer.learning_rate=log:1e-4..1e-1; optimizer.weight_decay=log:1e-5..1e-1"
    search.method = "random"  # grid: every combination | random | tpe: after 5 random trials
    search.trials = 0  # of each model and variant; --tune=N is the same; 0: no search
    search.seed = 0  # of what is drawn; trials are trained with the seed 10000 + this
    # Stops trials by their validation loss after each epoch: none | median: worse than the median
    # of earlier trials, after a quarter of the epochs | halving: not in the best third after a
    # ninth of them, nor after a third. Such a trial counts, but cannot win.
    search.prune = "none"

    # --- how to run, never what to compute: may change between a run and its resumption ---------
    runtime = config.runtime = ConfigDict()
    runtime.cache_dir = "~/.cache/archcompare"  # decoded images, stored features, programs
    runtime.feed = "auto"  # resident: images on the device | streaming: read ahead | auto
    # auto: if all parts together are larger, they are streamed. Images of array_record are then
    # decoded at every use; smaller ones are decoded once into `cache_dir`, as of any source.
    runtime.resident_limit_mb = 2048
    # Outputs of frozen stages are stored while they are smaller, on the device and in `cache_dir`;
    # 0: computed at every step. Seeds that train heads on them do so together, as many at once as
    # have states below this limit.
    runtime.feature_cache_mb = 2048.0
    runtime.checkpoint_every_seconds = 60.0  # at least; saved when training metrics are logged
    runtime.log_every_steps = 100  # and at each evaluation
    runtime.tensorboard = True

    # --- the report: may change at any time, and no result depends on it ------------------------
    compare = config.compare = ConfigDict()
    # Published test accuracies in percent, by model, to be shown beside ours; and where from.
    compare.reference = ConfigDict()
    compare.reference_source = ""
    compare.margin = 0.5  # a difference that matters, in points of what models are compared by
    # Model whose errors under corruption count as 100 %; "" is cnn, or else the least accurate.
    compare.baseline = ""
    # Test images, evenly spaced, that the report corrupts; 0: it says nothing of robustness.
    compare.robustness_images = 128
    compare.gradcam_images = 8  # in the grid of heat maps; 0: none are made
    compare.measure_speed = True  # of predictions, by the first seed of each model
    compare.average_weights = True  # of the seeds of each model, and its views of mirror images
    compare.look_inside = True  # filters, feature maps, similarity of representations

    if models:
        config.models = tuple(name for name in models.split(",") if name)
    return config
