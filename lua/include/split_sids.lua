-- Take a user's list of connections apart: '<length of the sid>:<sid>' for each, in the order of registration, and
-- after a '=' the answer of the user's last registration, '<token><answer>', kept for a call that is sent again.
local function split_sids(list)
  local sids, position = {}, 1
  while list and position <= #list do
    if string.sub(list, position, position) == '=' then
      return sids, string.sub(list, position + 1)
    end
    local colon = string.find(list, ':', position, true)
    local last = colon + string.sub(list, position, colon - 1)
    sids[#sids + 1] = string.sub(list, colon + 1, last)
    position = last + 1
  end
  return sids, ''
end
