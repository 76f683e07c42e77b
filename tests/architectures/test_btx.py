"""Names of experts, and which of them one source became."""

import pytest

from btx_merge.architectures.btx import expert_names, experts_by_domain


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"expert_names": ["seed", "v1.code", "v1.math"]}, {"seed": [0], "v1.code": [1], "v1.math": [2]}),
        ({"expert_names": ["a", "a.0"]}, {"a": [0], "a.0": [1]}),
        ({"expert_names": ["a.0", "a.1", "a.0.0", "a.0.1"], "num_chunks": 2}, {"a": [0, 1], "a.0": [2, 3]}),
        ({"num_local_experts": 2}, {"0": [0], "1": [1]}),
        ({"num_local_experts": 4, "num_chunks": 2}, {"0": [0, 1], "1": [2, 3]}),
    ],
)
def test_a_domain_is_what_one_source_became(config, expected):
    assert experts_by_domain(config) == expected
    assert len(expert_names(config)) == sum(map(len, expected.values()))
