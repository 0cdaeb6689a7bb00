"""Task files for lm-evaluation-harness whose questions are here: nothing is downloaded."""

import json
import pathlib

QUESTIONS = (
  ("What helps a friend who is sad?", ("To listen.", "To lecture.", "To leave."), 0),
  ("Two and two is", ("three.", "four.", "a red ladder."), 1),
  ("Name the feeling:", ("You sound hurt and alone.", "Cheer up.", "It is what it is."), 0),
  ("The bike is", ("gone.", "a kind of soup.", "four."), 0),
  ("", ("Tell me more about it.", "zzzz qqqq"), 0),
)
LONG = "The red ladder stood in the hall. Nobody knew who had left it there. " * 30
TASKS = {
  "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
""",
  "local_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [".", "\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list:
  - metric: exact_match
""",
  "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes the tasks and their questions; returns the folder."""
  folder.mkdir()
  data = folder / "questions.jsonl"
  with open(data, "w", encoding="utf-8") as file:
    for question, choices, label in QUESTIONS:
      text = f"{question} {choices[label]} {LONG}"
      record = {"question": question, "choices": choices, "label": label, "text": text}
      file.write(json.dumps(record) + "\n")
  for name, body in TASKS.items():
    head = f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}
test_split: test
"""
    (folder / f"{name}.yaml").write_text(head + body.lstrip(), encoding="utf-8")
  return folder
