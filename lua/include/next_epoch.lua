-- Give the namespace's next epoch: the server's time in us, or one more than the last epoch where that is larger, so it
-- grows when the clock runs back, and also when the server has lost its newest writes.
-- The last epoch is in last_seen, as minus the score of the empty sid: what writes there writes it in the same command.
local function next_epoch(last_epoch_score, time_us)
  if not last_epoch_score or -last_epoch_score < tonumber(time_us) then
    return time_us
  end
  -- @include as_argument
  return as_argument(1 - last_epoch_score)
end
