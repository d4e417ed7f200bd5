"""A run in scikit-learn's own tools."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn.base
import sklearn.pipeline
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted

import qlora_kit as qk


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, topics):
    spec = qk.TrainingSpec(max_steps=2, batch_size=8, learning_rate=5e-3, precision="fp32", threads=1)
    tracking = qk.TrackingSpec(wandb="none")
    experiment = qk.Experiment("tickets", qk.ModelSpec(str(tiny("bert"))), training=spec, tracking=tracking)
    rows = [
        (text, topics.label_names[label]) for text, label in zip(topics.train.texts, topics.train.labels, strict=True)
    ]
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("runs"), progress=False), rows


def test_a_run_says_in_scikit_learn_what_it_says(trained, topics):
    run, _ = trained
    classifier, found = qk.RunClassifier(run), run.predict(topics.test.texts)
    check_is_fitted(classifier)
    assert classifier.predict(topics.test.texts).tolist() == found.labels
    columns = [found.label_names.index(name) for name in classifier.classes_]
    assert np.array_equal(classifier.predict_proba(topics.test.texts), found.probabilities[:, columns])
    assert classifier.classes_.tolist() == sorted(run.label_names)
    truth = [topics.label_names[label] for label in topics.test.labels]
    accuracy = np.mean([a == b for a, b in zip(found.labels, truth, strict=True)])
    assert classifier.score(topics.test.texts, truth) == pytest.approx(accuracy)
    for texts in (
        pd.Series(topics.test.texts),
        np.array(topics.test.texts),
        np.array(topics.test.texts)[:, None],
        pd.DataFrame({"question": topics.test.texts}),
    ):
        assert classifier.predict(texts).tolist() == found.labels
    assert classifier.predict([]).shape == (0,) and classifier.predict_proba([]).shape == (0, 6)


def test_a_run_stands_at_the_end_of_a_pipeline_and_is_copied_and_pickled_by_its_folder(trained, topics):
    run, _ = trained
    texts = list(topics.test.texts[:8])
    shouted = [text.upper() for text in texts]
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = sklearn.pipeline.make_pipeline(lower, qk.RunClassifier(run.path))
    names = [topics.label_names[label] for label in topics.test.labels[:8]]
    assert pipeline.fit(shouted, names).predict(shouted).tolist() == run.predict(shouted).labels
    classifier = qk.RunClassifier(run, batch_size=2)
    classifier.predict(texts)
    kept = pickle.dumps(classifier)
    assert len(kept) < 1000, "no weights"
    for copy in (pickle.loads(kept), sklearn.base.clone(classifier)):
        assert copy.get_params() == {"run": str(run.path), "batch_size": 2}
        assert copy.predict(texts).tolist() == run.predict(texts).labels


def test_a_run_is_calibrated_on_other_rows(trained, topics):
    run, rows = trained
    texts, names = zip(*rows, strict=True)
    calibrated = CalibratedClassifierCV(FrozenEstimator(qk.RunClassifier(run)), method="sigmoid")
    calibrated.fit(list(texts), list(names))
    found = calibrated.predict_proba(list(topics.test.texts))
    assert found.shape == (len(topics.test.texts), 6) and np.allclose(found.sum(axis=1), 1)
    assert set(calibrated.predict(list(topics.test.texts))) <= set(topics.label_names)


def test_what_is_no_text_or_no_label_of_the_run_is_refused(trained, tmp_path):
    classifier = qk.RunClassifier(trained[0])
    with pytest.raises(qk.KitError, match=r"card_arival.*card_arrival"):
        classifier.fit(["a"], ["card_arival"])
    with pytest.raises(qk.KitError, match="one column, and this has 2"):
        classifier.predict(np.array([["a", "b"]]))
    with pytest.raises(qk.KitError):
        classifier.predict("a single text")
    with pytest.raises(qk.KitError, match="no run folder"):
        qk.RunClassifier(tmp_path / "none").predict(["a"])
    with pytest.raises(qk.KitError):
        qk.RunClassifier(3)
