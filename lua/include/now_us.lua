-- The server's clock in whole microseconds, as the text that commands take: joined, not computed, so that no number has
-- to be formatted. No other clock is ever read or passed in (guarantee 5).
local function now_us()
  local time = redis.call('TIME')
  local seconds, microseconds = time[1], time[2]
  if #microseconds < 6 then
    microseconds = string.sub('00000' .. microseconds, -6)
  end
  return seconds .. microseconds
end
