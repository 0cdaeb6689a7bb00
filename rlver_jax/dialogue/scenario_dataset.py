"""Scenario files as a TensorFlow Datasets dataset: ArrayRecord files with random access.

`open_source` is the way in. Nothing here imports TensorFlow or uses the network. Prepared
records live at `<cache_dir>/<SHA-256 of the scenario file>/scenario_dataset/<version>`, so that
runs share them and a changed file gets records of its own.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds
from google.protobuf import json_format

from rlver_jax.dialogue import scenario as scenario_lib
from rlver_jax.dialogue.scenario import Scenario
from rlver_jax.errors import UserError


class _LocalInfo(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    """Does nothing: no public bucket holds this dataset's statistics."""


class ScenarioDataset(tfds.core.GeneratorBasedBuilder):
  """One record a scenario, with the fields of `Scenario`, in the order of the file.

  `scenarios` are what `download_and_prepare` writes; to read prepared records, leave them out.
  """

  VERSION = tfds.core.Version("1.1.0")  # to be raised when the fields of a record change

  def __init__(self, *, scenarios: Sequence[Scenario] = (), **kwargs):
    self._scenarios = scenarios
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {field.name: tfds.features.Text() for field in dataclasses.fields(Scenario)}
    features["traits"] = tfds.features.Sequence(tfds.features.Text())
    return _LocalInfo(
      builder=self,
      description="Scenarios for simulated users in supportive dialogues.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # there is nothing to download
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for index, scenario in enumerate(self._scenarios):
      yield index, dataclasses.asdict(scenario)


class ScenarioSource(Sequence[Scenario]):
  """Random access to prepared scenarios; index i is the i-th scenario of the file."""

  def __init__(self, records: Sequence[dict]):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Scenario:
    if not -len(self) <= index < len(self):
      raise IndexError(f"scenario {index} of {len(self)}")
    record = self._records[index % len(self)]
    traits = tuple(trait.decode() for trait in record.pop("traits"))
    return Scenario(traits=traits, **{name: text.decode() for name, text in record.items()})


def open_source(path: str | os.PathLike, cache_dir: str | os.PathLike) -> ScenarioSource:
  """The scenarios of a file, prepared in `cache_dir` where they are not there yet.

  Any number of processes may do this at once, and one killed on the way leaves only a
  folder named `incomplete.*` that nobody reads.

  Args:
    path: a scenario file, or "en" or "zh" for the package's own.
    cache_dir: a folder for prepared records; made where missing, `~` allowed.

  Raises:
    UserError: if the file can't be read or a line of it is broken, `cache_dir` can't be written
      to, or its records are damaged.
  """
  scenarios, digest = scenario_lib.read(scenario_lib.resolve(os.fspath(path)))
  data_dir = pathlib.Path(cache_dir).expanduser() / digest
  prepared = data_dir / ScenarioDataset.name / str(ScenarioDataset.VERSION)
  if not os.path.exists(prepared):
    _prepare(scenarios, data_dir, prepared)
  try:
    source = ScenarioSource(ScenarioDataset(data_dir=data_dir).as_data_source("train"))
    ends = (source[0], source[-1])
    intact = len(source) == len(scenarios) and ends == (scenarios[0], scenarios[-1])
  # What the libraries raise where a file is gone, cut short or overwritten.
  except (RuntimeError, ValueError, json_format.ParseError):
    intact = False
  if not intact:
    raise UserError(
      f"{prepared}: the prepared scenarios are damaged, expected those of {path}; delete this "
      "folder and they are prepared again."
    )
  return source


def _prepare(scenarios: Sequence[Scenario], data_dir: pathlib.Path, prepared: pathlib.Path) -> None:
  """Writes the records to a folder of this process's own and renames it to `prepared`."""
  tfds.disable_progress_bar()
  try:
    # The library announces on stdout what it downloads and where to; neither is news here.
    with contextlib.redirect_stdout(io.StringIO()):
      ScenarioDataset(scenarios=scenarios, data_dir=data_dir).download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except (OSError, RuntimeError) as error:  # RuntimeError: ArrayRecord's, say for a full disk
    # Another process may have renamed its folder first; its records are as good as ours.
    if not os.path.exists(prepared):
      raise UserError(
        f"data.cache_dir: {data_dir} cannot be written to ({error}), expected a folder for "
        "prepared scenarios."
      ) from error
