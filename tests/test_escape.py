"""Passwords, tokens and signatures are shown as `***` by everything that is printed or written for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_score.cli.main import main
from dpo_score.config.load import dump_config, load_config, with_secrets_again
from dpo_score.errors import ConfigError, StorageError
from dpo_score.escape import safe, without_secrets
from dpo_score.storage.faults import explain

SECRET = "s3cr3tS3CR3T"
SHOWN = (
    (f"http://user:{SECRET}@host/x.parquet", "http://***@host/x.parquet"),
    (f"ftp://{SECRET}@host:21/x", "ftp://***@host:21/x"),
    (f"https://h/x?a=1&token={SECRET}&b=2", "https://h/x?a=1&token=***&b=2"),
    (
        f"https://h/x?X-Amz-Credential=A&X-Amz-Signature={SECRET}",
        "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***",
    ),
    (f"https://h/x?X-Amz-Security-Token={SECRET}", "https://h/x?X-Amz-Security-Token=***"),
    (f"https://a.blob.core/x?sv=2024&sig={SECRET}", "https://a.blob.core/x?sv=2024&sig=***"),
    (f"s3://bucket/k?AWSAccessKeyId=A&Signature={SECRET}", "s3://bucket/k?AWSAccessKeyId=***&Signature=***"),
    (f"simplecache::https://u:{SECRET}@h/x", "simplecache::https://***@h/x"),
    ("401: token hf_abcdefghijklmnop is invalid", "401: token hf_*** is invalid"),
    ("key AKIAIOSFODNN7EXAMPLE is unknown", "key *** is unknown"),
    (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
    (f"aws_secret_access_key={SECRET}", "aws_secret_access_key=***"),
    (f"https://user:pa/{SECRET}?#x@host/x", "https://***@host/x"),
    (f"AccountName=a;AccountKey={SECRET};Suffix=b", "AccountName=a;AccountKey=***;Suffix=b"),
    (f"options {{'key': 'a', 'secret': '{SECRET}'}}", "options {'key': 'a', 'secret': '***'}"),
    ("token ghp_abcdefghijklmnop is bad", "token ghp_*** is bad"),
)
KEPT = (
    "hf://datasets/owner/name@main/data/train.parquet",
    "s3://bucket/a@b/c.parquet",
    "https://host/x.parquet?download=true&page=2",
    "a row with key = value; and a question?",
    "row 3 of data/pairs.parquet: basic error",
    "http://host:8080/a@b/x.parquet",
    '{"pad_token": "<|pad|>"}',
    "zip://pairs.csv::https://host/x.zip",
)


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_secrets_are_hidden_in_what_is_shown_and_raised(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert safe(text) == shown
    assert str(ConfigError(f"{text} cannot be read")) == f"{shown} cannot be read"
    assert SECRET not in str(explain(OSError(5, "broken"), text))
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_is_shown_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_credentials_of_the_environment_are_hidden_wherever_a_library_says_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "Zq9/+plainlyunlike")
    assert str(StorageError("refused: Zq9/+plainlyunlike, try again")) == "refused: ***, try again"


def test_no_secret_is_in_the_copy_of_a_pipeline() -> None:
    url = f"https://user:{SECRET}@host/x.parquet?token={SECRET}"
    options = {"data": [url], "policy": ["a=b"], "reference": "c", "out": f"memory://u:{SECRET}@host/out"}
    assert SECRET not in dump_config(load_config(None, options, environment={}))


def test_a_url_that_is_given_again_stands_where_its_secrets_were_left_out(tmp_path: Path) -> None:
    url = f"https://user:{SECRET}@host/x.parquet?token={SECRET}"
    options = {"data": [f"a={url}", "b=data/y.parquet"], "policy": ["a=b"], "reference": "c"}
    (tmp_path / "pipeline.yaml").write_text(dump_config(load_config(None, options, environment={})))
    stored = load_config(str(tmp_path / "pipeline.yaml"), {}, environment={})
    for given in (url, f"a={url};b=data/y.parquet"):
        again = with_secrets_again(stored, "OUT/pipeline.yaml", {"DPO_SCORE_DATA": given})
        assert [spec.path for spec in again.data] == [url, "data/y.parquet"]
    with pytest.raises(ConfigError, match=r"holds https://\*\*\*@host.*set DPO_SCORE_DATA to the URL"):
        with_secrets_again(stored, "OUT/pipeline.yaml", {})


@pytest.mark.parametrize(
    "command",
    [
        f"run --data http://user:{SECRET}@127.0.0.1:9/x.parquet?token={SECRET} --reference a --policy b=c --out OUT",
        f"run --data ftp://user:{SECRET}@127.0.0.1:9/x.parquet --reference a --policy b=c --out OUT",
        f"status http://user:{SECRET}@127.0.0.1:9/out?token={SECRET}",
        f"verify s3://user:{SECRET}@127.0.0.1:9/out?sig={SECRET}",
    ],
)
def test_no_command_prints_a_secret(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command.replace("OUT", str(tmp_path / "out")).split())
    said = capsys.readouterr()
    assert stopped.value.code
    assert SECRET not in said.out + said.err
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
