-- Give the namespace's next epoch: the server's time in us, or one more than the last epoch if that is larger, so
-- epochs grow even when the clock runs back or the server has lost its newest writes.
-- The last epoch is in last_seen, as minus the score of the empty sid, so a registration writes it with the command
-- that writes its own score.
local function next_epoch(last_epoch_score, time_us)
  if not last_epoch_score or -last_epoch_score < tonumber(time_us) then
    return time_us
  end
  -- @include as_argument
  return as_argument(1 - last_epoch_score)
end
