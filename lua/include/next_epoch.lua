-- @include as_argument
-- Give the namespace's next epoch: the server's time in us, or one more than the last epoch where that is larger, so it
-- grows when the clock runs back, and also when the server has lost its newest writes.
local function next_epoch(epoch_key, time_us, key_lifetime_ms)
  local last = redis.call('SET', epoch_key, time_us, 'GET', 'PX', key_lifetime_ms)
  if not last or tonumber(last) < tonumber(time_us) then
    return time_us
  end
  local epoch = as_argument(last + 1)
  redis.call('SET', epoch_key, epoch, 'PX', key_lifetime_ms)
  return epoch
end
