"""A pipeline stands for its model wherever one is asked for, as one would guess who knows Chronos-2's."""

import pytest
import torch
from chronos.chronos2 import Chronos2Pipeline

from chronomoe import (
    ChronoMoEPipeline,
    InputError,
    MixtureConfig,
    MoEConfig,
    MoEEnhancedChronos2,
    MoEInsertionConfig,
    RoutingConfig,
    StudentConfig,
    build_mixture,
    create_student_model,
    upcycle,
)


@pytest.fixture(params=[Chronos2Pipeline, ChronoMoEPipeline])
def pipeline(request, make_teacher):
    return request.param(make_teacher(num_layers=2))


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_a_student_is_cut_from_a_pipeline_as_from_its_model(pipeline):
    size = StudentConfig(num_layers=1)
    assert same(create_student_model(pipeline, size), create_student_model(pipeline.model, size))


def test_a_student_size_may_be_the_name_of_a_preset(pipeline):
    size = StudentConfig.preset("slim", pipeline.model)
    assert same(create_student_model(pipeline, "slim"), create_student_model(pipeline, size))
    assert create_student_model(pipeline).config.num_layers == 1  # "small" unless told otherwise
    with pytest.raises(InputError, match="Unknown student preset 'smal'"):
        create_student_model(pipeline, "smal")


def test_a_pipeline_is_upcycled_and_expanded_as_its_model_is(pipeline):
    layers = MoEConfig(num_experts=2, top_k=1)
    assert same(upcycle(pipeline, layers), upcycle(pipeline.model, layers))
    after = MoEInsertionConfig(after=(1,), layer=layers)
    assert same(MoEEnhancedChronos2(pipeline, after), MoEEnhancedChronos2(pipeline.model, after))


def test_moe_layers_alone_go_after_the_last_block(pipeline):
    grown = MoEEnhancedChronos2(pipeline, MoEConfig(num_experts=3, top_k=2))
    assert grown.moe_blocks == [1]
    assert grown.insertion.layer.num_experts == 3


def test_a_mixture_is_made_of_a_list_or_a_dictionary_of_students_or_their_pipelines(pipeline):
    students = [create_student_model(pipeline, StudentConfig(num_layers=layers)) for layers in (1, 2)]
    named = {"sales": students[0], "load": ChronoMoEPipeline(students[1])}
    listed = build_mixture(students, num_experts_per_tok=1)
    assert (listed.config.expert_names, listed.top_k) == (["expert-0", "expert-1"], 1)
    assert build_mixture(named).config.expert_names == ["sales", "load"]
    assert same(build_mixture(named).experts, listed.experts)


def test_the_number_of_experts_goes_before_that_of_the_configuration(pipeline):
    config = MixtureConfig(routing=RoutingConfig(top_k=1, temperature=0.5))
    mixture = build_mixture([pipeline, pipeline], config, num_experts_per_tok=2)
    assert (mixture.top_k, mixture.moe.routing.temperature) == (2, 0.5)
    with pytest.raises(InputError, match="top_k must be from 1 to 2, the number of experts, got 3"):
        build_mixture([pipeline, pipeline], num_experts_per_tok=3)


def test_a_mixture_is_no_expert(pipeline):
    mixture = build_mixture([pipeline], num_experts_per_tok=1)
    with pytest.raises(InputError, match="expert 'expert-1' needs a dense Chronos-2 model, got a DistilledMoE"):
        build_mixture([pipeline, mixture])
