-- Tell whether the call whose answer is kept in a user's list from first on (see split_sids) may be sent again: within
-- a minute, longer than any client retries. The answer begins, behind the 16 characters of its token, with the time in
-- us, of which these are the digits down to the ms.
local function is_recent(list, first, now)
  local answered_at = list:sub(first + 16, first + 28)
  return answered_at ~= '' and now - answered_at < 60000
end
