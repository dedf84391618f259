"""Operations of a model beside its experts, in one kernel each."""
