"""The maths on stacked blocks: functions of tensors, no communication."""
